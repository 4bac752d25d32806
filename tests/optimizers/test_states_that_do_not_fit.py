"""States that are incomplete, or of another objective or configuration, are refused and change nothing."""

import copy
import subprocess
import sys

import pytest
import torch
from optimizer_cases import assert_same
from torch import nn

from curvlib import GGN, Fisher, Objective
from curvlib.approximations import EKFAC, KFAC, LBFGS, Dense, Diagonal, EigenbasisAverage, MovingAverage
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import operator_from_state_dict
from curvlib.optimizers import (
    CurvatureScaling,
    FixedLength,
    FixedScaling,
    ModelDescent,
    PreconditionedGradient,
    Preconditioner,
    SecondOrderOptimizer,
    hessian_free,
    kfac,
    newton_trust_region,
)
from curvlib.optimizers.words import in_words
from curvlib.output_losses import AutogradLoss
from curvlib.solvers import CG, ConstantDamping, MoreSorensen, TrustRegion, damped_inverse


def network(loss=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Objective(model, loss or nn.MSELoss())


def batch():
    torch.manual_seed(1)
    return torch.randn(32, 3, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)


def in_region(objective, **options):
    direction = ModelDescent(descent=MoreSorensen(), **options)
    return SecondOrderOptimizer(
        objective, direction=direction, step_rule=FixedLength(), radius=TrustRegion(initial=3.0)
    )


AVERAGED = Preconditioner(curvature=KFAC(GGN()), decay=0.9)
COMPOSITIONS = {
    "kfac": kfac,
    "ekfac": lambda objective: kfac(objective, curvature=EKFAC(Fisher()), solver=damped_inverse),
    "hessian-free": lambda objective: hessian_free(objective, preconditioner=AVERAGED),
    "trust": lambda objective: newton_trust_region(objective, preconditioner=EKFAC(GGN())),
    "preconditioned": lambda objective: newton_trust_region(objective, preconditioner=AVERAGED),
    "averaged": lambda objective: in_region(objective, curvature=KFAC(GGN()), decay=0.9),
    "scaled": lambda objective: in_region(objective, curvature=Dense(GGN()), scaling=CurvatureScaling()),
    "lbfgs": lambda objective: in_region(objective, curvature=LBFGS() + 0.1 * KFAC(GGN())),
}  # fmt: skip
compositions = pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=COMPOSITIONS)


def paths(state, path=()):
    """Every entry of a state that is itself made of dictionaries and lists, but PyTorch's own and what it names."""
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, entry in entries:
        if not path and key in ("state", "param_groups", "made_for"):
            continue
        if isinstance(state, dict):
            yield (*path, key)
        yield from paths(entry, (*path, key))


def without(state, path):
    """A copy of the state without one entry."""
    broken = copy.deepcopy(state)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return broken


@compositions
def test_no_entry_of_a_state_may_be_missing(make):
    optimizer, fresh = make(network()), make(network())
    for _ in range(3):
        optimizer.step(batch())
    state = optimizer.state_dict()
    before = copy.deepcopy(fresh.state_dict())
    for path in paths(state):
        with pytest.raises(ValueError, match=r"lacks|got \[") as caught:
            fresh.load_state_dict(without(state, path))
        assert str(path[-1]) in str(caught.value), path
        assert_same(fresh.state_dict(), before)
    fresh.load_state_dict(state)
    assert_same(fresh.state_dict(), state)


@compositions
@pytest.mark.parametrize("groups", [[], [{}], None], ids=["empty", "no parameters", "none"])
def test_parameter_groups_that_do_not_fit_change_nothing(make, groups):
    optimizer, fresh = make(network()), make(network())
    optimizer.step(batch())
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups?|nothing was changed"):
        fresh.load_state_dict({**optimizer.state_dict(), "param_groups": groups})
    assert_same(fresh.state_dict(), before)


def test_an_interrupted_load_changes_nothing():
    optimizer, fresh = kfac(network()), kfac(network())
    optimizer.step(batch())
    before = copy.deepcopy(fresh.state_dict())

    def interrupt(_):
        raise KeyboardInterrupt

    fresh.register_load_state_dict_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fresh.load_state_dict(optimizer.state_dict())
    assert_same(fresh.state_dict(), before)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"control": None}, "control is incomplete"),
        ({"control": {}}, "lacks damping, radius"),
        ({"direction": None}, "must be a dictionary, got NoneType"),
        ({"made_for": None}, "cannot be read.*nothing was changed"),
        ({"previous": torch.ones(3)}, r"must have shape \(26,\), got \(3,\)"),
    ],
)
def test_parts_of_another_kind_are_refused(entries, message):
    optimizer = in_region(network(), curvature=Dense(GGN()))
    optimizer.step(batch())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**before, **entries})
    assert_same(optimizer.state_dict(), before)


def test_a_state_without_the_radius_of_a_trust_region_is_refused():
    optimizer = in_region(network(), curvature=Dense(GGN()))
    optimizer.step(batch())
    state = copy.deepcopy(optimizer.state_dict())
    state["control"]["radius"] = None
    with pytest.raises(ValueError, match="has the radius None"):
        optimizer.load_state_dict(state)
    assert optimizer.radius is not None


@pytest.mark.parametrize(
    "make", [lambda: MovingAverage(KFAC(GGN())), lambda: EigenbasisAverage(EKFAC(GGN()))], ids=["moving", "eigenbasis"]
)
def test_averages_refuse_incomplete_states(make):
    average, fresh = make(), make()
    average.update(network().at(batch()))
    state = average.state_dict()
    before = copy.deepcopy(fresh.state_dict())
    for path in paths(state):
        with pytest.raises(ValueError, match="incomplete: it lacks"):
            fresh.load_state_dict(without(state, path))
        assert_same(fresh.state_dict(), before)


def test_the_pairs_of_lbfgs_are_whole():
    history = LBFGS().start()
    history.update(torch.ones(2), torch.ones(2))
    fresh = LBFGS().start()
    with pytest.raises(ValueError, match="1 steps and 0 gradient changes"):
        fresh.load_state_dict({**history.state_dict(), "gradient_changes": []})
    assert fresh.updates == 0


def test_an_operator_that_lacks_a_field_is_refused():
    state = DiagonalOperator(torch.ones(2)).state_dict()
    (name,) = state["fields"]
    with pytest.raises(ValueError, match=f"the operator Diagonal is incomplete: it lacks {name}"):
        operator_from_state_dict({**state, "fields": {}})


LOSSES = [
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])),
    AutogradLoss(nn.HuberLoss(delta=1.0)),
    AutogradLoss(nn.HuberLoss(delta=2.0)),
]


@pytest.mark.parametrize("own", range(len(LOSSES)), ids=lambda i: f"{i}-{type(LOSSES[i]).__name__}")
def test_a_state_goes_with_its_own_loss_alone(own):
    def make(loss):
        direction = PreconditionedGradient(curvature=Diagonal(GGN()), fraction=1.0)
        return SecondOrderOptimizer(
            network(loss), direction=direction, step_rule=FixedLength(), damping=ConstantDamping(1.0)
        )

    state = make(LOSSES[own]).state_dict()
    for other, loss in enumerate(LOSSES):
        if other == own:
            make(copy.deepcopy(loss)).load_state_dict(state)
            continue
        with pytest.raises(ValueError, match="made with another objective"):
            make(loss).load_state_dict(state)


def test_tensors_of_a_configuration_are_compared_in_full():
    """PyTorch's repr leaves out the middle of long tensors."""
    size = 1230
    objective = Objective(nn.Linear(size - 1, 1).double(), nn.MSELoss())
    ones = torch.ones(size, dtype=torch.float64)
    other = ones.clone()
    other[100:1000] = 50.0
    assert repr(other) == repr(ones)

    def scaled(values):
        return in_region(objective, curvature=KFAC(GGN()), scaling=FixedScaling(values))

    scaled(ones.clone()).load_state_dict(scaled(ones).state_dict())
    with pytest.raises(ValueError, match="made with another direction"):
        scaled(other).load_state_dict(scaled(ones).state_dict())
    texts = [in_words(CG(preconditioner=DiagonalOperator(values))) for values in (ones, ones.clone(), other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_the_digest_sees_type_and_shape(dtype):
    value = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    assert in_words(value) == in_words(value.T.contiguous().T) != in_words(value.T)
    assert in_words(value) != in_words(value.to(torch.float16))
    assert in_words(value[0, 0]) != in_words(value[0, 1])


def test_words_are_the_same_in_every_process():
    """Neither an address nor a salted hash is in the words of a composition."""
    program = (
        "import torch, curvlib\n"
        "from curvlib.solvers import CustomDamping\n"
        "from curvlib.output_losses import AutogradLoss\n"
        "torch.manual_seed(0)\n"
        "loss = AutogradLoss(lambda z, y: (z - y).square().mean())\n"
        "o = curvlib.Objective(torch.nn.Linear(2, 1), loss)\n"
        "s = curvlib.optimizers.hessian_free(o, damping=CustomDamping(lambda k: 1.0))\n"
        "print(s.state_dict()['made_for'])\n"
    )
    texts = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert " at 0x" not in texts[0]
