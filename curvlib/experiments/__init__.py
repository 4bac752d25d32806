"""Problems, data, methods and what is behind the commands ``curvlib compare`` and ``curvlib inspect``.

The Python interface is the one that the command line uses::

    from pathlib import Path
    from curvlib.experiments import PROBLEMS, Comparison, ResultsFolder, Steps, compare, configure, prepare_folder

    problem = PROBLEMS.get("digits-autoencoder")
    methods = tuple(configure(name, problem, {}) for name in ("kfac", "adam"))
    comparison = Comparison(problem=problem, methods=methods, budget=Steps(100))
    folder = ResultsFolder(Path("results/digits-autoencoder"))
    prepare_folder(comparison, folder)
    outcome = compare(comparison, problem.load(), folder)

It needs the optional dependencies of ``pip install "curvlib[experiments]"``.
"""

from __future__ import annotations

try:
    import click  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"curvlib.experiments needs click, rich, matplotlib and scikit-learn, and {error.name} is missing: "
        'pip install "curvlib[experiments]"'
    ) from error

import curvlib.experiments.recurrent_problems
import curvlib.experiments.trust_region_method  # noqa: F401 - both register what they hold
from curvlib.experiments.budgets import Budget, Epochs, EvaluationSchedule, Seconds, Steps
from curvlib.experiments.comparison import Comparison, Monitor, Outcome
from curvlib.experiments.curvatures import APPROXIMATIONS, MATRICES, CurvatureChoice
from curvlib.experiments.curves import generate_curves
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.figure import figure_png
from curvlib.experiments.idx import read_idx
from curvlib.experiments.images import Images, ImageSource
from curvlib.experiments.inspection import Inspected, InspectedRow, Inspection
from curvlib.experiments.inspection_figures import Picture, pictures_of
from curvlib.experiments.inspection_matrix import Looked
from curvlib.experiments.inspection_report import html_page, results_table
from curvlib.experiments.inspection_run import inspect_evaluation
from curvlib.experiments.inspection_selection import Region, Selection
from curvlib.experiments.inspection_subject import Subject, Training
from curvlib.experiments.inspection_work import StopInspection
from curvlib.experiments.methods import METHODS, Method, configure, register_method
from curvlib.experiments.networks import Convolution, Convolutional, FullyConnected, Network
from curvlib.experiments.preparation import prepare_folder, reopen_folder, replace_folder
from curvlib.experiments.problems import PROBLEMS, Problem, register_problem
from curvlib.experiments.records import Record, Status
from curvlib.experiments.recurrent import Recurrent
from curvlib.experiments.report import results_tables
from curvlib.experiments.results_folder import ResultsFolder
from curvlib.experiments.runner import compare
from curvlib.experiments.sequence_layers import Embedded, Entry, EveryStep, Exit, LastStep, Numbers, OneHot, Rows
from curvlib.experiments.sequences import (
    Addition,
    CopyMemory,
    Sequences,
    SequenceSource,
    generate_addition,
    generate_copy,
)
from curvlib.experiments.sources import Baseline, Source
from curvlib.experiments.tasks import Metric, Task
from curvlib.experiments.text import CharacterText
from curvlib.experiments.trainers import StepReport, Trainer

__all__ = [
    "APPROXIMATIONS",
    "MATRICES",
    "METHODS",
    "PROBLEMS",
    "Addition",
    "Baseline",
    "Budget",
    "CharacterText",
    "Comparison",
    "Convolution",
    "Convolutional",
    "CopyMemory",
    "CurvatureChoice",
    "Embedded",
    "Entry",
    "Epochs",
    "EvaluationSchedule",
    "EveryStep",
    "Exit",
    "ExperimentError",
    "FullyConnected",
    "ImageSource",
    "Images",
    "Inspected",
    "InspectedRow",
    "Inspection",
    "LastStep",
    "Looked",
    "Method",
    "Metric",
    "Monitor",
    "Network",
    "Numbers",
    "OneHot",
    "Outcome",
    "Picture",
    "Problem",
    "Record",
    "Recurrent",
    "Region",
    "ResultsFolder",
    "Rows",
    "Seconds",
    "Selection",
    "SequenceSource",
    "Sequences",
    "Source",
    "Status",
    "StepReport",
    "Steps",
    "StopInspection",
    "Subject",
    "Task",
    "Trainer",
    "Training",
    "compare",
    "configure",
    "figure_png",
    "generate_addition",
    "generate_copy",
    "generate_curves",
    "html_page",
    "inspect_evaluation",
    "pictures_of",
    "prepare_folder",
    "read_idx",
    "register_method",
    "register_problem",
    "reopen_folder",
    "replace_folder",
    "results_table",
    "results_tables",
]
