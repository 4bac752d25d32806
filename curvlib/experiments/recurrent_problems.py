"""The problems with recurrent networks: rows of images, and sequences that need a memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from curvlib.experiments.images import MNIST, Digits
from curvlib.experiments.problems import Problem, register_problem
from curvlib.experiments.recurrent import Recurrent, orthogonal, remembering, sparse_recurrent
from curvlib.experiments.sequence_layers import Embedded, EveryStep, LastStep, Numbers, OneHot, Rows
from curvlib.experiments.sequence_tasks import NextCharacter, Reproduction, Sum
from curvlib.experiments.sequences import Addition, CopyMemory
from curvlib.experiments.tasks import Classification
from curvlib.experiments.text import CharacterText

# Methods with steps of many gradients: every one goes through all steps of the sequences one after the other.
_LARGE: Mapping[str, Mapping[str, int | float]] = {
    "hessian-free": {"batch_size": 1000, "curvature_fraction": 0.2},
    "lbfgs": {"batch_size": 2000},
}

register_problem(
    Problem(
        name="rowwise-digits-rnn",
        description="Recognise 8x8 digits, read row by row",
        source=Digits(),
        task=Classification(),
        network=Recurrent(
            entry=Rows(rows=8, features=8), cell=nn.RNN, outputs=10, exit=LastStep(), initialise=orthogonal, units=32
        ),
        settings={"sgd": {"lr": 0.1}, "adam": {"lr": 0.003}},
    )
)
register_problem(
    Problem(
        name="rowwise-mnist-rnn",
        description="Recognise 28x28 digits, read row by row",
        source=MNIST(),
        task=Classification(),
        network=Recurrent(
            entry=Rows(rows=28, features=28), cell=nn.RNN, outputs=10, exit=LastStep(), initialise=orthogonal
        ),
        settings={**_LARGE, "sgd": {"lr": 0.03}, "adam": {"lr": 0.003}},
    )
)
register_problem(
    Problem(
        name="rowwise-mnist-lstm",
        description="Recognise 28x28 digits, read row by row by an LSTM",
        source=MNIST(),
        task=Classification(),
        network=Recurrent(
            entry=Rows(rows=28, features=28), cell=nn.LSTM, outputs=10, exit=LastStep(), initialise=remembering
        ),
        settings={**_LARGE, "sgd": {"lr": 0.1}, "adam": {"lr": 0.003}},
    )
)
register_problem(
    Problem(
        name="addition",
        description="Add the two marked numbers of a sequence",
        source=Addition(),
        task=Sum(),
        network=Recurrent(
            entry=Numbers(features=2), cell=nn.RNN, outputs=1, exit=LastStep(), initialise=sparse_recurrent, units=100
        ),
        l2=1e-6,
        settings={
            **_LARGE,
            # The weight of Martens & Sutskever (2011) is 1/30: slower, see the benchmarks.
            "hessian-free": {
                "rules": "martens",
                "batch_size": 2000,
                "curvature_fraction": 0.1,
                "damping": 0.1,
                "structural_weight": 0.003,
            },
            "sgd": {"lr": 0.01, "batch_size": 50},
            "adam": {"lr": 0.002, "batch_size": 50},
        },
    )
)
register_problem(
    Problem(
        name="copy-memory",
        description="Reproduce ten symbols after many blanks",
        source=CopyMemory(),
        task=Reproduction(),
        # The signal is never an answer.
        network=Recurrent(
            entry=OneHot(features=10), cell=nn.LSTM, outputs=9, exit=EveryStep(), initialise=remembering, units=100
        ),
        l2=1e-6,
        settings={**_LARGE, "sgd": {"lr": 0.3, "batch_size": 50}, "adam": {"lr": 0.003, "batch_size": 50}},
    )
)
register_problem(
    Problem(
        name="character-lm",
        description="Guess the next character of a text",
        source=CharacterText(),
        task=NextCharacter(),
        network=Recurrent(
            entry=Embedded(features=64), cell=nn.LSTM, outputs=None, exit=EveryStep(), initialise=remembering
        ),
        l2=1e-6,
        evaluated_examples=1000,
        settings={
            "hessian-free": {"batch_size": 500, "curvature_fraction": 0.2},
            "lbfgs": {"batch_size": 1000},
            "sgd": {"lr": 1.0, "batch_size": 50},
            "adam": {"lr": 0.01, "batch_size": 50},
        },
    )
)
