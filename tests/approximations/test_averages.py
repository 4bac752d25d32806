"""Statistics over several batches: estimate_over and MovingAverage."""

import pytest
import torch
from cases import LOSSES, PositionsLast, mlp
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, StaleEvaluationError, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Identity, MovingAverage

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SIZES = (3, 5, 2)


def problem(case=LOSSES[1], reduction="mean", l2=0.2):
    torch.manual_seed(3)
    model, inputs = mlp([3, 4, 3]), torch.randn(sum(SIZES), 3).double()
    outputs = model(inputs).detach()
    targets = case.targets(outputs)
    pairs = isinstance(targets, tuple)
    parts = list(zip(*(t.split(SIZES) for t in targets), strict=True)) if pairs else targets.split(SIZES)
    objective = Objective(model, case.make(outputs, reduction), l2=l2)
    return objective, (inputs, targets), list(zip(inputs.split(SIZES), parts, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
@pytest.mark.parametrize("approximation", [Exact, Dense, BlockDiagonal, Diagonal])
def test_estimate_over_equals_one_large_batch(approximation, matrix, case, reduction):
    objective, whole, parts = problem(case, reduction)
    expected = approximation(matrix).estimate(objective.at(whole)).to_dense()
    C = approximation(matrix).estimate_over(objective, parts, progress=False)
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_over_batches_equals_one_large_batch(reduction):
    objective, whole, parts = problem(LOSSES[0], reduction)
    expected = KFAC(GGN()).estimate(objective.at(whole)).to_dense()
    torch.testing.assert_close(
        KFAC(GGN()).estimate_over(objective, parts, progress=False).to_dense(), expected, **CLOSE
    )


def test_exact_hessian_and_quadratic_forms_over_batches():
    objective, whole, parts = problem()
    C = Exact(Hessian()).estimate_over(objective, parts, progress=False)
    expected = Dense(Hessian()).estimate(objective.at(whole)).to_dense()
    V = torch.randn(C.size, 2).double()
    torch.testing.assert_close(C @ V, expected @ V, **CLOSE)
    torch.testing.assert_close(C.quadratic_form(V), V.T @ expected @ V, **CLOSE)


def test_exact_fisher_over_batches_repeats_its_draws():
    objective, _, parts = problem()
    C = Exact(Fisher()).estimate_over(objective, parts, progress=False)
    v = torch.randn(C.size).double()
    assert torch.equal(C @ v, C @ v)
    torch.testing.assert_close(C.to_dense(), C.to_dense().T, **CLOSE)


def test_exact_over_batches_raises_when_the_parameters_change():
    objective, _, parts = problem()
    C = Exact(GGN()).estimate_over(objective, parts, progress=False)
    with torch.no_grad():
        objective.model[0].weight.mul_(2.0)
    with pytest.raises(StaleEvaluationError, match="since estimate_over"):
        C @ torch.ones(C.size).double()


def test_exact_over_batches_raises_when_the_data_change():
    objective, _, parts = problem()
    C = Exact(GGN()).estimate_over(objective, parts, progress=False)
    parts[0][0].mul_(3.0)
    with pytest.raises(RuntimeError, match="another objective value"):
        C @ torch.ones(C.size).double()


def test_exact_over_batches_takes_another_order_unless_draws_belong_to_batches():
    objective, _, parts = problem()
    v = torch.randn(objective.layout.size).double()
    ggn = Exact(GGN()).estimate_over(objective, parts, progress=False)
    before = ggn @ v
    fisher = Exact(Fisher()).estimate_over(objective, parts, progress=False)
    parts.reverse()
    torch.testing.assert_close(ggn @ v, before, **CLOSE)
    with pytest.raises(RuntimeError, match="another objective value"):
        fisher @ v


@pytest.mark.parametrize("approximation", [Exact(GGN()), KFAC(GGN())])
def test_an_empty_loader_is_refused(approximation):
    objective, _, _ = problem()
    with pytest.raises(ValueError, match="at least one batch"):
        approximation.estimate_over(objective, [], progress=False)


def test_progress_goes_to_standard_error(capsys):
    objective, _, parts = problem()
    KFAC(GGN()).estimate_over(objective, parts)
    assert "KFAC statistics" in capsys.readouterr().err
    KFAC(GGN()).estimate_over(objective, parts, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "approximation", [KFAC(GGN()), Diagonal(GGN()), BlockDiagonal(GGN()), Dense(GGN()), Identity()]
)
def test_moving_average_starts_without_bias_and_decays(approximation):
    objective, _, parts = problem()
    average = MovingAverage(approximation, decay=0.6)
    evaluations = [objective.at(part) for part in (*parts, parts[0], parts[0])]
    singles = [approximation.statistics(evaluation) for evaluation in evaluations]
    expected = None
    for k, (evaluation, single) in enumerate(zip(evaluations, singles, strict=True), start=1):
        average.update(evaluation)
        epsilon = min(1 - 1 / k, 0.6)
        expected = (
            single if expected is None else expected.times(epsilon, epsilon) + single.times(1 - epsilon, 1 - epsilon)
        )
        torch.testing.assert_close(
            average.operator(objective).to_dense(), approximation.operator(objective, expected).to_dense(), **CLOSE
        )
    assert average.updates == 5


def test_decay_changes_the_average():
    objective, _, parts = problem()
    results = []
    for decay in (0.0, 0.5, 0.9):
        average = MovingAverage(Diagonal(GGN()), decay)
        for part in (*parts, *parts):
            average.update(objective.at(part))
        results.append(average.operator(objective).diagonal())
    torch.testing.assert_close(results[0], Diagonal(GGN()).estimate(objective.at(parts[-1])).diagonal(), **CLOSE)
    assert not torch.allclose(results[1], results[2])


def test_statistics_that_are_not_finite_never_enter_the_average():
    objective, _, parts = problem()
    average = MovingAverage(KFAC(GGN()))
    assert average.update(objective.at(parts[0]))
    before = average.operator(objective).to_dense()
    x, y = parts[1]
    assert not average.update(objective.at((x * float("nan"), y)))
    assert (average.updates, average.skipped) == (1, 1)
    assert torch.equal(average.operator(objective).to_dense(), before)


def test_moving_average_state_round_trip():
    objective, _, parts = problem()
    first, second = MovingAverage(KFAC(GGN())), MovingAverage(KFAC(GGN()))
    first.update(objective.at(parts[0]))
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update(objective.at(parts[1]))
    assert torch.equal(first.operator(objective).to_dense(), second.operator(objective).to_dense())


def test_moving_average_refuses_what_does_not_average():
    with pytest.raises(TypeError, match="statistics that average"):
        MovingAverage(Exact(GGN()))
    with pytest.raises(ValueError, match="0 <= decay < 1"):
        MovingAverage(KFAC(GGN()), decay=1.0)
    with pytest.raises(RuntimeError, match="no statistics yet"):
        MovingAverage(KFAC(GGN())).operator(problem()[0])


@pytest.mark.parametrize("approximation", [KFAC, Diagonal, BlockDiagonal, Exact, Dense])
def test_a_matrix_is_required(approximation):
    with pytest.raises(TypeError, match="needs a curvature matrix"):
        approximation("ggn")


def test_describe_names_every_parameter_once():
    objective, _, _ = problem()
    for approximation in (KFAC(GGN()), Diagonal(GGN()), BlockDiagonal(GGN()), Exact(GGN()), Dense(GGN()), Identity()):
        rows = objective.describe(approximation).rows
        assert tuple(row.parameter for row in rows) == objective.layout.names


def test_unsupported_layers_are_refused_before_the_loader_is_touched():
    model = nn.Sequential(nn.Bilinear(2, 2, 2))

    def loader():
        raise AssertionError("touched the data")
        yield

    with pytest.raises(UnsupportedLayerError, match="no layer rule for Bilinear"):
        KFAC(GGN()).estimate_over(Objective(model, nn.MSELoss()), loader(), progress=False)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_fisher_needs_a_positive_number_of_samples(samples):
    with pytest.raises(ValueError, match="samples >= 1"):
        Fisher(samples=samples)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cut", [(5, 2, 2), (6, 3), (1, 8), (9,)], ids=str)
def test_examples_without_targets_are_left_out_however_the_data_are_cut(cut, reduction):
    """Two of nine targets are ignored, alone in a batch of their own for one of the cuts."""
    model, x, y = mlp([3, 4, 3]), torch.randn(9, 3).double(), torch.randint(3, (9,))
    y[5:7] = -100
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction))
    kept = torch.cat([torch.arange(5), torch.arange(7, 9)])
    expected = KFAC(GGN()).estimate(objective.at((x[kept], y[kept]))).to_dense()
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    C = KFAC(GGN()).estimate_over(objective, batches, progress=False)
    torch.testing.assert_close(C.to_dense(), expected, rtol=1e-9, atol=1e-11)


def test_the_mean_number_of_positions_has_the_precision_of_the_statistics():
    """Lengths 2, 3 and 3 have the mean 8/3, which float32 rounds by 3e-8."""
    torch.manual_seed(0)
    model = mlp([2, 3], final=[PositionsLast()])
    x, y = torch.randn(3, 3, 2).double(), torch.tensor([[0, 1, -100], [1, 0, 2], [2, 0, 1]])
    objective = Objective(model, nn.CrossEntropyLoss())
    expected = KFAC(GGN()).estimate(objective.at((x, y))).to_dense()
    over = KFAC(GGN()).estimate_over(objective, [(x[:2], y[:2]), (x[2:], y[2:])], progress=False)
    torch.testing.assert_close(over.to_dense(), expected, rtol=1e-12, atol=1e-13)
