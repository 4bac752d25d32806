"""Low-rank approximations: full rank is the matrix, truncations are its leading part, diagonals make the sum right."""

import networks as architectures
import pytest
import torch
from cases import EVERY_LOSS, LOSSES, mlp, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import (
    Dense,
    EstimatedRemainder,
    FullRank,
    LanczosTruncation,
    LowRank,
    MovingAverage,
    NonFiniteStatisticsError,
    Nystrom,
    RandomizedSketch,
    Remainder,
)
from curvlib.operators import LowRank as LowRankOperator
from curvlib.solvers import damped_inverse

# float64 sums of a few hundred products of numbers around 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
TRUNCATIONS = (RandomizedSketch, Nystrom, LanczosTruncation)


def evaluate(network):
    return Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))


def classifier(examples=6, l2=0.0, widths=(3, 4, 3)):
    torch.manual_seed(1)
    inputs, targets = torch.randn(examples, widths[0]).double(), torch.randint(widths[-1], (examples,))
    return Network(mlp(widths), nn.CrossEntropyLoss(), inputs, targets, l2)


def best(dense, rank):
    """The truncated eigendecomposition, the best approximation of this rank."""
    e, Q = torch.linalg.eigh(dense)
    keep = e.abs().argsort(descending=True)[:rank]
    return (Q[:, keep] * e[keep]) @ Q[:, keep].T


@pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda case: case.name)
@given(data=st.data())
@settings(max_examples=6)
def test_full_rank_is_the_matrix_and_its_inverse_the_exact_damped_solve(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation, dense = evaluate(network), network.ggn()
    C = LowRank(GGN()).estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), dense, **CLOSE)
    gradient = network.gradient()
    # condition numbers stay below 1e5 here, so that float64 leaves 1e-11 of the solution
    damping = 1e-3 * max(float(torch.linalg.matrix_norm(dense, 2)), 1e-6)
    expected = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=dense.dtype), gradient)
    step = damped_inverse(C, damping) @ gradient
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-8 * float(expected.abs().max()) + 1e-300)


@pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda case: case.name)
@given(data=st.data())
@settings(max_examples=3)
def test_full_rank_of_the_empirical_fisher(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation = evaluate(network)
    dense = network.empirical_fisher(evaluation.objective.loss.scale(evaluation.outputs, network.targets))
    C = LowRank(EmpiricalFisher()).estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), dense, **CLOSE)


@pytest.mark.parametrize("samples", [1, 3])
def test_full_rank_of_the_fisher_has_a_column_a_draw_and_example(samples):
    evaluation = evaluate(classifier())
    C = LowRank(Fisher(samples=samples)).estimate(evaluation, torch.Generator().manual_seed(0))
    assert C.factor.shape == (evaluation.layout.size, 6 * samples)
    again = LowRank(Fisher(samples=samples)).estimate(evaluation, torch.Generator().manual_seed(0))
    assert torch.equal(C.factor, again.factor)


class Meeting(nn.Module):
    """Examples meet, and a parameter is outside every layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.scale * torch.tanh(self.inner(x))
        return self.outer(x - x.mean(0))


@pytest.mark.parametrize(
    ("make", "inputs", "targets"),
    [
        (Meeting, lambda: torch.randn(4, 3).double(), lambda: torch.randint(2, (4,))),
        (architectures.ViT, lambda: torch.randn(2, 2, 4, 4).double(), lambda: torch.randint(3, (2,))),
        (architectures.GPT, lambda: torch.randint(5, (2, 4)), lambda: torch.randint(5, (2, 4))),
        (architectures.UNet, lambda: torch.randn(2, 1, 4, 4).double(), lambda: torch.randint(2, (2, 4, 4))),
    ],
    ids=["examples meet", "vit", "gpt", "u-net"],
)
@pytest.mark.filterwarnings("ignore::curvlib.FusedKernelWarning")
def test_any_model(make, inputs, targets):
    torch.manual_seed(2)
    network = Network(make().double(), nn.CrossEntropyLoss(), inputs(), targets())
    evaluation, dense = evaluate(network), network.ggn()
    torch.testing.assert_close(LowRank(GGN()).estimate(evaluation).to_dense(), dense, rtol=1e-8, atol=1e-10)
    part = LowRank(GGN(), method=LanczosTruncation(2), diagonal=Remainder()).estimate(evaluation)
    torch.testing.assert_close(part.diagonal(), dense.diagonal(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[7]], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "method", [FullRank(), RandomizedSketch(31, 0), Nystrom(31), LanczosTruncation(31)], ids=lambda m: type(m).__name__
)
def test_over_a_loader_as_one_large_batch(method, case, reduction):
    torch.manual_seed(3)
    model, inputs = mlp([3, 4, 3]), torch.randn(10, 3).double()
    outputs = model(inputs).detach()
    targets = case.targets(outputs)
    pairs = isinstance(targets, tuple)
    parts = list(zip(*(t.split(4) for t in targets), strict=True)) if pairs else targets.split(4)
    objective = Objective(model, case.make(outputs, reduction), l2=0.2)
    expected = Dense(GGN()).estimate(objective.at((inputs, targets))).to_dense()
    C = LowRank(GGN(), method=method).estimate_over(
        objective, list(zip(inputs.split(4), parts, strict=True)), progress=False
    )
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


def test_draws_over_a_loader_are_those_of_the_remainder():
    """Every product and the diagonal see the same labels: a remainder of other draws would not have this diagonal."""
    network = classifier(9)
    objective = Objective(network.model, network.loss)
    loader = list(zip(network.inputs.split(4), network.targets.split(4), strict=True))

    def estimate(**options):
        generator = torch.Generator().manual_seed(5)
        return LowRank(Fisher(), **options).estimate_over(objective, loader, generator, progress=False)

    whole = estimate()
    part = estimate(method=Nystrom(2, oversampling=2), diagonal=Remainder())
    torch.testing.assert_close(part.diagonal(), whole.diagonal(), **CLOSE)
    assert part.factor.shape[1] == 2
    assert float(part.diagonal_part.min()) > -1e-12


def test_ranks_beyond_the_matrix_are_exact():
    network = classifier(2, widths=(3, 5, 3))
    evaluation, dense = evaluate(network), network.ggn()
    assert torch.linalg.matrix_rank(dense) == 4  # two examples, of whose three logits one is redundant
    for method in (RandomizedSketch(4), Nystrom(4), LanczosTruncation(4), LanczosTruncation(len(dense))):
        C = LowRank(GGN(), method=method).estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), dense, **CLOSE)
        assert C.factor.shape[1] <= method.rank


@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher(), Hessian()], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_converged_truncations_are_the_best_of_their_rank(matrix, rank):
    network = classifier(12)
    evaluation = evaluate(network)
    dense = Dense(matrix).estimate(evaluation).to_dense()
    for method in (RandomizedSketch(rank, oversampling=20, power_iterations=40), LanczosTruncation(rank, len(dense))):
        C = LowRank(matrix, method=method).estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), best(dense, rank), rtol=1e-7, atol=1e-9)


def test_more_work_makes_a_better_sketch():
    network = classifier(40, widths=(6, 8, 4))
    evaluation, dense = evaluate(network), network.ggn()

    def error(method):
        errors = [
            torch.linalg.matrix_norm(
                LowRank(GGN(), method=method).estimate(evaluation, torch.Generator().manual_seed(s)).to_dense() - dense
            )
            for s in range(5)
        ]
        return float(torch.stack(errors).mean())

    least = float(torch.linalg.matrix_norm(best(dense, 4) - dense))
    for few, many in (
        (RandomizedSketch(4, 0, 0), RandomizedSketch(4, 8, 0)),
        (RandomizedSketch(4, 0, 0), RandomizedSketch(4, 0, 2)),
        (Nystrom(4, 0), Nystrom(4, 10)),
        (LanczosTruncation(4, 4), LanczosTruncation(4, 12)),
    ):
        assert least < error(many) < error(few)


def test_the_expected_error_of_a_sketch_is_below_its_bound():
    """Halko et al. 2011, theorem 10.5: E |C - Q Q^T C|_F <= sqrt(1 + r / (p - 1)) times the best error of rank r.

    The two-sided Q Q^T C Q Q^T has at most sqrt(2) times that error, and truncation from r + p to r adds at most the
    best error of rank r of what was found, which is no larger than that of C itself.
    """
    network = classifier(40, widths=(6, 8, 4))
    evaluation, dense = evaluate(network), network.ggn()
    r, p = 4, 6
    least = torch.linalg.matrix_norm(best(dense, r) - dense)
    generator = torch.Generator().manual_seed(0)
    sketch = LowRank(GGN(), method=RandomizedSketch(r, p, 0))
    errors = [torch.linalg.matrix_norm(sketch.estimate(evaluation, generator).to_dense() - dense) for _ in range(20)]
    assert torch.stack(errors).mean() <= (2**0.5 * (1 + r / (p - 1)) ** 0.5 + 1) * least


def test_nystrom_never_exceeds_the_matrix():
    network = classifier(12)
    evaluation, dense = evaluate(network), network.ggn()
    for rank in (1, 3):
        low = LowRank(GGN(), method=Nystrom(rank, oversampling=1)).estimate(evaluation).to_dense()
        assert torch.linalg.eigvalsh(dense - low).min() > -1e-12
        assert torch.linalg.eigvalsh(low).min() > -1e-12


def test_lanczos_finds_equal_eigenvalues_and_survives_the_zero_matrix():
    """A linear model with one-hot inputs has eigenvalues of multiplicity: one Krylov space holds one vector of each."""
    model = nn.Linear(3, 2, bias=False).double()
    network = Network(model, nn.MSELoss(), torch.eye(3).double(), torch.randn(3, 2).double())
    C = LowRank(GGN(), method=LanczosTruncation(6)).estimate(evaluate(network))
    torch.testing.assert_close(C.to_dense(), network.ggn(), **CLOSE)
    torch.testing.assert_close(C.weights, torch.full((6,), 1 / 3, dtype=torch.float64), **CLOSE)
    zero = Network(model, nn.MSELoss(), torch.zeros(3, 3).double(), torch.randn(3, 2).double())
    for method in TRUNCATIONS:
        assert not LowRank(GGN(), method=method(2)).estimate(evaluate(zero)).to_dense().any()


def test_single_precision():
    torch.manual_seed(0)
    model = mlp([5, 6, 3]).float()
    evaluation = Objective(model, nn.CrossEntropyLoss()).at((torch.randn(20, 5), torch.randint(3, (20,))))
    dense = Dense(GGN()).estimate(evaluation).to_dense()
    # products carry float32's rounding, 1e-7 of the largest eigenvalue, and sums of 60 of them a few times that
    tolerance = 2e-6 * float(torch.linalg.matrix_norm(dense, 2))
    for method in (FullRank(), RandomizedSketch(40), Nystrom(40), LanczosTruncation(40, 57)):
        C = LowRank(GGN(), method=method).estimate(evaluation)
        assert C.dtype == torch.float32
        error = float((C.to_dense() - dense).abs().max())
        # the shift of Nystrom, 8 eps of the norm, is the error that it may make of small eigenvalues
        assert error < (10 if isinstance(method, Nystrom) else 1) * tolerance, method


def test_the_shift_of_nystrom_is_taken_off_again():
    """For a multiple of the identity of size 40 the shift is 8 eps sqrt(40) = 6e-6 of the eigenvalue, in float32."""
    model = nn.Linear(20, 2, bias=False)
    evaluation = Objective(model, nn.MSELoss()).at((torch.eye(20), torch.randn(20, 2)))
    weights = LowRank(GGN(), method=Nystrom(40)).estimate(evaluation).weights
    torch.testing.assert_close(weights, torch.full((40,), 0.05), rtol=1e-6, atol=0)


def test_negative_eigenvalues_count_by_their_size():
    """A product of two small layers far from its target: the curvature of the model, of both signs, is the largest."""
    model = mlp([1, 2, 1], nn.Identity, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    x, y = torch.ones(1, 1).double(), torch.full((1, 1), 10.0).double()
    evaluation = Objective(model, nn.MSELoss()).at((x, y))
    dense = Dense(Hessian()).estimate(evaluation).to_dense()
    e = torch.linalg.eigvalsh(dense)
    assert (e < -15).sum() == (e > 15).sum() == 2
    for method in (RandomizedSketch(3, 1), LanczosTruncation(3)):
        C = LowRank(Hessian(), method=method).estimate(evaluation)
        assert int((C.weights < 0).sum()) >= 1
        error = torch.linalg.matrix_norm(C.to_dense() - dense, 2)
        torch.testing.assert_close(error, e.abs().min(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", TRUNCATIONS)
def test_the_remainder_makes_the_diagonal_exact(method):
    network = classifier(12, l2=0.3)
    evaluation = evaluate(network)
    alone = LowRank(GGN(), method=method(2)).estimate(evaluation)
    C = LowRank(GGN(), method=method(2), diagonal=Remainder()).estimate(evaluation)
    torch.testing.assert_close(C.diagonal(), network.ggn().diagonal(), **CLOSE)
    assert not torch.allclose(alone.diagonal(), network.ggn().diagonal(), rtol=1e-2)


def test_the_estimated_remainder_is_unbiased_with_the_variance_of_what_is_left():
    """Entry i of one probe has the variance sum_{j != i} R_ij^2 / probes, R the remainder: a z-test of every entry."""
    network = classifier(5, widths=(2, 2, 3))
    evaluation = evaluate(network)
    for matrix in (GGN(), Hessian()):
        dense = Dense(matrix).estimate(evaluation).to_dense()
        low = LowRank(matrix, method=LanczosTruncation(3, 12), diagonal=EstimatedRemainder(2))
        generator, count = torch.Generator().manual_seed(0), 150
        draws = torch.stack([low.estimate(evaluation, generator).diagonal() for _ in range(count)])
        R = dense - best(dense, 3)
        variance = (R.square().sum(1) - R.diagonal().square()) / 2
        z = (draws.mean(0) - dense.diagonal()) / (variance / count).sqrt().clamp(min=1e-12)
        assert z.abs().max() < 5  # a false alarm below 1e-4 for 15 entries
        # 150 draws of strongly correlated entries estimate a variance to about sqrt(2 / 150) = 0.12, to 3 of which
        assert (draws.var(0).sum() / variance.sum() - 1).abs() < 0.36


def test_low_rank_plus_diagonal_is_inverted_by_structure():
    network = classifier(12, l2=0.1)
    evaluation = evaluate(network)
    C = LowRank(GGN(), method=Nystrom(3), diagonal=Remainder()).estimate(evaluation)
    inverse = damped_inverse(C, 0.05)
    assert isinstance(inverse, LowRankOperator)
    eye = torch.eye(C.size, dtype=torch.float64)
    torch.testing.assert_close(inverse @ (C.to_dense() + 0.05 * eye), eye, rtol=0, atol=1e-10)


def test_too_much_memory_is_refused_before_any_backward_pass():
    evaluation = evaluate(classifier())
    needed = 6 * 2 * evaluation.layout.size * 8  # softmax over 3 classes has 2 vectors
    assert LowRank(GGN(), method=FullRank(memory_limit=needed)).estimate(evaluation).factor.shape[1] == 12
    before = evaluation.work
    with pytest.raises(MemoryError, match=rf"{needed:,} bytes.*RandomizedSketch\(rank\)"):
        LowRank(GGN(), method=FullRank(memory_limit=needed - 1)).estimate(evaluation)
    assert evaluation.work == before


def test_the_hessian_is_refused_by_name_where_it_has_no_meaning():
    for method in (FullRank(), Nystrom(2)):
        with pytest.raises(TypeError, match=rf"{type(method).__name__} needs vectors .* Hessian\(\) has products only"):
            LowRank(Hessian(), method=method)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="leaves out nothing"):
        LowRank(GGN(), diagonal=Remainder())
    with pytest.raises(TypeError, match="method"):
        LowRank(GGN(), method="lanczos")
    with pytest.raises(TypeError, match="diagonal"):
        LowRank(GGN(), method=Nystrom(1), diagonal=True)
    with pytest.raises(TypeError, match="needs a curvature matrix"):
        LowRank("ggn")
    for make, name in (
        (lambda: RandomizedSketch(0), "rank"),
        (lambda: RandomizedSketch(1, -1), "oversampling"),
        (lambda: RandomizedSketch(1, 1, 0.5), "power_iterations"),
        (lambda: Nystrom(True), "rank"),
        (lambda: LanczosTruncation(3, 2), "steps"),
        (lambda: FullRank(memory_limit=0), "memory_limit"),
        (lambda: EstimatedRemainder(0), "probes"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
    with pytest.raises(TypeError, match="statistics that average"):
        MovingAverage(LowRank(GGN()))


def test_batches_that_are_not_finite_are_refused():
    network = classifier()
    objective = Objective(network.model, network.loss)
    bad = objective.at((network.inputs * float("nan"), network.targets))
    for method in (FullRank(), RandomizedSketch(2), Nystrom(2), LanczosTruncation(2)):
        with pytest.raises(NonFiniteStatisticsError):
            LowRank(GGN(), method=method).estimate(bad)
