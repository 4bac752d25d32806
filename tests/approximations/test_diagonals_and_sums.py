"""Diagonals by random signs and by roots, and weighted sums of approximations."""

import networks as architectures
import numpy as np
import pytest
import torch
from cases import EVERY_LOSS, mlp, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, UnsupportedLayerError
from curvlib.approximations import (
    KFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    Exact,
    HutchinsonDiagonal,
    Identity,
    LowRank,
    MovingAverage,
    PerLayer,
    RootDiagonal,
    RootMeanSquareDiagonal,
    StatisticalWeightedSum,
    StructuralDamping,
    WeightedSum,
    hutchinson,
)
from curvlib.operators import BlockDiagonal as BlockDiagonalOperator
from curvlib.operators import CholeskyInverse
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.optimizers import LayerDamping, PreconditionedGradient, hessian_free, kfac
from curvlib.solvers import CG, MINRES, BlockwiseDamping, DeterminismCheck, FactoredTikhonov, damped_inverse

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def evaluate(network):
    return Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))


def classifier(examples=9, widths=(3, 4, 3), l2=0.2):
    torch.manual_seed(1)
    inputs, targets = torch.randn(examples, widths[0]).double(), torch.randint(widths[-1], (examples,))
    return Network(mlp(widths), nn.CrossEntropyLoss(), inputs, targets, l2)


def batches_of(network, size=4):
    return list(zip(network.inputs.split(size), network.targets.split(size), strict=True))


class TestHutchinson:
    @pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher(), Hessian()], ids=str)
    def test_all_sign_vectors_together_are_exact(self, matrix, monkeypatch):
        """The mean over all 2^D sign vectors is the expectation itself."""
        network = classifier(widths=(1, 2, 2))
        evaluation = evaluate(network)
        dense = Dense(matrix).estimate(evaluation).to_dense()
        size = len(dense)
        signs = torch.cartesian_prod(*[torch.tensor([0, 1])] * size).T
        monkeypatch.setattr(hutchinson.torch, "randint", lambda *args, **kwargs: signs)
        C = HutchinsonDiagonal(matrix, probes=2**size).estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), torch.diag(dense.diagonal()), **CLOSE)

    @pytest.mark.parametrize("matrix", [GGN(), Hessian()], ids=str)
    def test_it_is_unbiased_with_the_known_variance(self, matrix):
        """Entry i of p probes has the variance sum_{j != i} C_ij^2 / p: a z-test of every entry."""
        evaluation = evaluate(classifier(5, (2, 2, 3)))
        dense = Dense(matrix).estimate(evaluation).to_dense()
        generator, count, probes = torch.Generator().manual_seed(0), 200, 3
        approximation = HutchinsonDiagonal(matrix, probes)
        draws = torch.stack([approximation.estimate(evaluation, generator).diagonal() for _ in range(count)])
        variance = (dense.square().sum(1) - dense.diagonal().square()) / probes
        z = (draws.mean(0) - dense.diagonal()) / (variance / count).sqrt().clamp(min=1e-12)
        assert z.abs().max() < 5  # a false alarm below 1e-4 for 15 entries
        # 200 strongly correlated draws estimate a variance to about sqrt(2 / 200) = 0.1, to 4 of which
        assert (draws.var(0).sum() / variance.sum() - 1).abs() < 0.4

    def test_over_batches_and_averages_it_is_unbiased(self):
        network = classifier(9, (2, 2, 2))
        objective = Objective(network.model, network.loss, l2=0.2)
        batches = batches_of(network)
        dense = Dense(Hessian()).estimate(objective.at((network.inputs, network.targets))).diagonal()
        approximation, generator = HutchinsonDiagonal(Hessian(), 1), torch.Generator().manual_seed(0)
        draws = [approximation.estimate_over(objective, batches, generator, progress=False) for _ in range(150)]
        draws = torch.stack([C.diagonal() for C in draws])
        z = (draws.mean(0) - dense) / (draws.std(0) / 150**0.5).clamp(min=1e-12)
        assert z.abs().max() < 5
        average = MovingAverage(approximation)
        assert average.update(objective.at(batches[0]))
        assert not average.update(objective.at((batches[0][0] * float("nan"), batches[0][1])))

    def test_any_model_and_arguments(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Bilinear(2, 2, 2)).double()

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = model

            def forward(self, x):
                return self.layer[0](x, x)

        evaluation = Objective(Twice(), nn.MSELoss()).at((torch.randn(3, 2).double(), torch.randn(3, 2).double()))
        C = HutchinsonDiagonal(Hessian()).estimate(evaluation, torch.Generator().manual_seed(0))
        assert isinstance(C, DiagonalOperator)
        assert torch.equal(
            C.values, HutchinsonDiagonal(Hessian()).estimate(evaluation, torch.Generator().manual_seed(0)).values
        )
        with pytest.raises(ValueError, match="probes >= 1"):
            HutchinsonDiagonal(Hessian(), probes=0)
        with pytest.raises(TypeError, match="needs a curvature matrix"):
            HutchinsonDiagonal("hessian")


class TestRootDiagonal:
    @pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda case: case.name)
    @given(data=st.data())
    @settings(max_examples=3)
    def test_it_is_the_root_of_the_diagonal_plus_the_l2_term(self, case, data):
        network = data.draw(networks(losses=(case,)))
        evaluation = evaluate(network)
        root = RootDiagonal(GGN()).estimate(evaluation).to_dense()
        expected = (network.ggn().diagonal() - network.l2).clamp(min=0).sqrt() + network.l2
        # a root turns rounding of 1e-16 into 1e-8 where the diagonal is 0
        torch.testing.assert_close(root, torch.diag(expected), rtol=1e-7, atol=1e-7)

    def test_averages_come_before_the_root(self):
        network = classifier()
        objective = Objective(network.model, network.loss)
        average = MovingAverage(RootDiagonal(EmpiricalFisher()), decay=0.5)
        moments = []
        for batch in batches_of(network)[:2]:
            average.update(objective.at(batch))
            moments.append(Diagonal(EmpiricalFisher()).estimate(objective.at(batch)).diagonal())
        torch.testing.assert_close(average.operator(objective).diagonal(), (0.5 * sum(moments)).sqrt(), **CLOSE)

    def test_it_scales_with_the_root_of_the_objective(self):
        inputs, targets = torch.randn(8, 3).double(), torch.randint(3, (8,))
        mean, total = (
            RootDiagonal(GGN()).estimate(Objective(model, nn.CrossEntropyLoss(reduction=r)).at((inputs, targets)))
            for model in [mlp([3, 3])]
            for r in ("mean", "sum")
        )
        torch.testing.assert_close(total.diagonal(), 8**0.5 * mean.diagonal(), **CLOSE)

    def test_parameters_outside_every_layer_and_mixtures(self):
        torch.manual_seed(0)
        network = Network(
            architectures.ViT().double(),
            nn.CrossEntropyLoss(),
            torch.randn(2, 2, 4, 4).double(),
            torch.randint(3, (2,)),
        )
        evaluation = evaluate(network)
        C = RootDiagonal(GGN(), on_unsupported="diagonal").estimate(evaluation)
        torch.testing.assert_close(C.diagonal(), network.ggn().diagonal().clamp(min=0).sqrt(), rtol=1e-6, atol=1e-7)
        with pytest.raises(UnsupportedLayerError):
            RootDiagonal(GGN()).estimate(evaluation)
        with pytest.raises(ValueError, match="no dense blocks"):
            RootDiagonal(GGN(), on_unsupported="dense")
        with pytest.raises(TypeError, match="PerLayer cannot mix RootDiagonal"):
            PerLayer([("head", RootDiagonal(GGN()))], otherwise=Diagonal(GGN()))
        with pytest.raises(TypeError, match=r"use RootMeanSquareDiagonal\(Diagonal\(Hessian\(\)\)\)"):
            RootDiagonal(Hessian())
        assert "root of the diagonal" in str(evaluation.objective.describe(RootDiagonal(GGN())))


PARTS = (
    Dense(Hessian()), Diagonal(GGN()), KFAC(GGN()), BlockDiagonal(EmpiricalFisher()), Identity(),
    Exact(GGN()), LowRank(GGN()),
)  # fmt: skip


class TestWeightedSum:
    @given(
        st.lists(st.tuples(st.floats(-3, 3), st.sampled_from(PARTS)), min_size=1, max_size=3),
        st.sampled_from([0.0, 0.2]),
    )
    @settings(max_examples=25)
    def test_it_is_the_sum_of_the_losses_curvatures_with_the_l2_term_once(self, chosen, l2):
        network = classifier(l2=l2)
        evaluation = evaluate(network)
        total = sum((weight * part for weight, part in chosen[1:]), start=chosen[0][0] * chosen[0][1])
        eye = torch.eye(evaluation.layout.size, dtype=torch.float64)
        expected = l2 * eye
        for weight, part in chosen:
            expected = expected + weight * (part.estimate(evaluation).to_dense() - l2 * eye)
        C = total.estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), expected, **CLOSE)
        over = total.estimate_over(evaluation.objective, [(network.inputs, network.targets)], progress=False)
        torch.testing.assert_close(over.to_dense(), expected, **CLOSE)
        statistical = all(part not in (Exact(GGN()), LowRank(GGN())) for _, part in chosen)
        assert isinstance(total, StatisticalWeightedSum) == statistical

    def test_numbers_and_repr(self):
        total = 0.5 * (2 * KFAC(GGN()) + Diagonal(GGN())) * np.float64(2.0) + Exact(Hessian())
        assert isinstance(total, WeightedSum)
        assert total.parts == ((2.0, KFAC(GGN())), (1.0, Diagonal(GGN())), (1.0, Exact(Hessian())))
        assert repr(total).startswith("2.0 * KFAC(matrix=GGN()")
        assert repr(total).endswith(" + 1.0 * Exact(matrix=Hessian())")
        assert 2.0 * KFAC(GGN()) == KFAC(GGN()) * 2.0
        for make in (lambda: KFAC(GGN()) + 1.0, lambda: "2" * KFAC(GGN()), lambda: True * KFAC(GGN())):
            with pytest.raises(TypeError):
                make()
        with pytest.raises(ValueError, match="finite weights"):
            float("nan") * KFAC(GGN())
        with pytest.raises(ValueError, match="at least one"):
            WeightedSum(())
        with pytest.raises(TypeError, match="StatisticalApproximation"):
            StatisticalWeightedSum(((1.0, Exact(GGN())),))

    def test_statistics_average_in_one_pass(self):
        network = classifier()
        objective = Objective(network.model, network.loss, l2=0.2)
        parts = ((0.7, KFAC(GGN())), (0.3, Diagonal(EmpiricalFisher())), (-0.1, Dense(Hessian())))
        total = sum((weight * part for weight, part in parts[1:]), start=parts[0][0] * parts[0][1])
        averages = [MovingAverage(part, 0.5) for part in (total, *(part for _, part in parts))]
        for batch in batches_of(network):
            for average in averages:
                assert average.update(objective.at(batch))
        whole, *singles = (average.operator(objective).to_dense() for average in averages)
        eye = torch.eye(len(whole), dtype=torch.float64)
        expected = 0.2 * eye + sum(
            weight * (single - 0.2 * eye) for (weight, _), single in zip(parts, singles, strict=True)
        )
        torch.testing.assert_close(whole, expected, **CLOSE)
        once = iter(batches_of(network))  # statistics need one pass alone
        over = total.estimate_over(objective, once, progress=False).to_dense()
        expected = 0.2 * eye
        for weight, part in parts:
            single = part.estimate_over(objective, batches_of(network), progress=False).to_dense()
            expected = expected + weight * (single - 0.2 * eye)
        torch.testing.assert_close(over, expected, **CLOSE)
        resumed = MovingAverage(total, 0.5)
        resumed.load_state_dict(averages[0].state_dict())
        assert torch.equal(resumed.operator(objective).to_dense(), whole)
        with pytest.raises(TypeError, match="iterated once only"):
            (total + Exact(GGN())).estimate_over(objective, iter(batches_of(network)), progress=False)

    def test_parts_draw_labels_of_their_own(self):
        evaluation = evaluate(classifier())
        generator = torch.Generator().manual_seed(3)
        C = (1.0 * Diagonal(Fisher()) + -1.0 * Diagonal(Fisher())).estimate(evaluation, generator)
        assert float(C.diagonal().std()) > 1e-3
        again = torch.Generator().manual_seed(3)
        first, second = (Diagonal(Fisher()).estimate(evaluation, again).diagonal() for _ in range(2))
        torch.testing.assert_close(C.diagonal(), first - second + 0.2, **CLOSE)

    def test_sums_of_blocks_are_inverted_block_by_block(self):
        evaluation = evaluate(classifier())
        C = (0.5 * BlockDiagonal(GGN()) + 2.0 * Diagonal(EmpiricalFisher())).estimate(evaluation)
        inverse = damped_inverse(C, 0.01)
        assert isinstance(inverse, BlockDiagonalOperator)
        assert [type(block) for block in inverse.blocks] == [CholeskyInverse, CholeskyInverse]
        eye = torch.eye(C.size, dtype=torch.float64)
        torch.testing.assert_close(inverse @ (C.to_dense() + 0.01 * eye), eye, rtol=0, atol=1e-10)

    def test_descriptions_and_checks_of_the_parts(self):
        evaluation = evaluate(classifier())
        table = evaluation.objective.describe(2.0 * Exact(GGN()) + 0.5 * KFAC(GGN()))
        assert table.rows[0].block == "2 x (exact, matrix-free) + 0.5 x (Kronecker: A 4 x 4, G 4 x 4)"
        assert table.rows[0].layer == "0"
        assert [row.parameter for row in table.rows] == list(evaluation.layout.names)
        other = Objective(nn.Bilinear(2, 2, 2), nn.MSELoss())
        for total in (1.0 * KFAC(GGN()) + Exact(GGN()), 1.0 * KFAC(GGN()) + Identity()):
            with pytest.raises(UnsupportedLayerError):
                total.check(other)
            with pytest.raises(UnsupportedLayerError):
                total.estimate_over(other, [], progress=False)

    def test_what_has_no_l2_term_loses_none(self):
        evaluation = evaluate(classifier())
        S = StructuralDamping(modules=(nn.Tanh,))
        C = (2.0 * Exact(GGN()) + 3.0 * S).estimate(evaluation).to_dense()
        eye = torch.eye(len(C), dtype=torch.float64)
        ggn, structural = (part.estimate(evaluation).to_dense() for part in (Exact(GGN()), S))
        torch.testing.assert_close(C, 2 * (ggn - 0.2 * eye) + 3 * structural + 0.2 * eye, **CLOSE)


class TestRootMeanSquare:
    def test_over_steps_it_is_adahessian(self):
        """By hand: v_k = eps_k v_(k-1) + (1 - eps_k) d_k^2, d_k = z * (H z) of the dense Hessian of batch k."""
        network = classifier(l2=0.2)
        objective = Objective(network.model, network.loss, l2=0.2)
        average = MovingAverage(RootMeanSquareDiagonal(HutchinsonDiagonal(Hessian(), probes=1)), decay=0.5)
        generators, size = [torch.Generator().manual_seed(4) for _ in range(2)], objective.layout.size
        second_moment = torch.zeros(size, dtype=torch.float64)
        for k, (x, y) in enumerate(batches_of(network, 3), start=1):
            assert average.update(objective.at((x, y)), generators[0])
            H = Network(network.model, network.loss, x, y, 0.0).hessian()
            z = (2 * torch.randint(2, (size, 1), generator=generators[1]) - 1).squeeze(1).double()
            decay = min(1 - 1 / k, 0.5)
            second_moment = decay * second_moment + (1 - decay) * (z * (H @ z)).square()
        assert k == 3
        torch.testing.assert_close(average.operator(objective).diagonal(), second_moment.sqrt() + 0.2, **CLOSE)

    def test_on_one_batch_it_is_the_absolute_value_without_the_l2_term_inside(self):
        evaluation = evaluate(classifier())
        H = Dense(Hessian()).estimate(evaluation).diagonal() - 0.2
        assert H.min() < 0
        C = RootMeanSquareDiagonal(Dense(Hessian())).estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), torch.diag(H.abs() + 0.2), **CLOSE)
        assert not RootMeanSquareDiagonal(Dense(Hessian())).may_be_indefinite

    def test_it_trains_where_the_diagonal_alone_is_refused(self):
        network = classifier()
        objective, batch = Objective(network.model, network.loss), (network.inputs, network.targets)
        diagonal = HutchinsonDiagonal(Hessian(), probes=1)
        with pytest.raises(ValueError, match=r"HutchinsonDiagonal.* may be indefinite.*RootMeanSquareDiagonal"):
            kfac(objective, curvature=diagonal)
        with pytest.raises(ValueError, match=r"TruncatedNewton .* preconditioner=HutchinsonDiagonal.* may be"):
            hessian_free(objective, preconditioner=diagonal)
        optimizer = kfac(objective, curvature=RootMeanSquareDiagonal(diagonal), solver=damped_inverse)
        losses = [optimizer.step(batch).loss for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]

    def test_arguments_and_description(self):
        objective = evaluate(classifier()).objective
        table = objective.describe(RootMeanSquareDiagonal(Diagonal(GGN())))
        assert {row.block for row in table.rows} == {"root mean square of (diagonal)"}
        with pytest.raises(TypeError, match=r"needs an approximation with statistics.*got Exact"):
            RootMeanSquareDiagonal(Exact(GGN()))
        with pytest.raises(UnsupportedLayerError):
            RootMeanSquareDiagonal(Diagonal(GGN())).check(Objective(nn.Bilinear(2, 2, 2), nn.MSELoss()))


@pytest.mark.parametrize(
    ("curvature", "solver", "refused"),
    [
        (Exact(Hessian()), CG(), True),
        (Exact(Hessian()), MINRES(), False),
        (Dense(Hessian()), LayerDamping({}, solver=MINRES()), False),
        (Dense(Hessian()), DeterminismCheck(), True),
        (Dense(Hessian()), BlockwiseDamping(factors=torch.ones(2), solver=MINRES()), False),
        (KFAC(GGN()) - 0.1 * Diagonal(GGN()), FactoredTikhonov(), True),
        (KFAC(GGN()) + 0.1 * Diagonal(GGN()), FactoredTikhonov(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_indefinite_needs_a_solver_that_takes_it(curvature, solver, refused):
    if not refused:
        PreconditionedGradient(curvature=curvature, solver=solver)
        return
    with pytest.raises(ValueError, match="may be indefinite"):
        PreconditionedGradient(curvature=curvature, solver=solver)


class TestArithmetic:
    def test_signs(self):
        A, B = KFAC(GGN()), Diagonal(GGN())
        assert (A - 2 * B).parts == ((1.0, A), (-2.0, B))
        assert (-(A + B) / 2).parts == ((-0.5, A), (-0.5, B))
        assert sum([A, 2 * B, A]).parts == ((1.0, A), (2.0, B), (1.0, A))
        assert sum([A]) is A
        assert isinstance(A - B, StatisticalWeightedSum)
        assert (A - B).may_be_indefinite
        assert not (A + B).may_be_indefinite
        evaluation = evaluate(classifier())
        difference = (Dense(GGN()) - Dense(Hessian()) / 2).estimate(evaluation).to_dense()
        ggn, hessian = (Dense(matrix).estimate(evaluation).to_dense() for matrix in (GGN(), Hessian()))
        eye = torch.eye(len(ggn), dtype=torch.float64)
        torch.testing.assert_close(difference, ggn - hessian / 2 - (0.2 - 0.1 - 0.2) * eye, **CLOSE)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda A, C: A + 0.1, r"If 0.1 is a damping, give it to the solver"),
            (lambda A, C: 1 - A, r"If 1 is a damping, give it to the solver"),
            (lambda A, C: A + C, r"Estimate it first: C = approximation.estimate\(evaluation\)"),
            (lambda A, C: C - A, r"Estimate it first: C = approximation.estimate\(evaluation\)"),
            (lambda A, C: A @ torch.ones(2), r"approximation.estimate\(evaluation\) @ vector"),
            (lambda A, C: A * A, "products and quotients of approximations"),
            (lambda A, C: A / A, "products and quotients of approximations"),
            (lambda A, C: torch.tensor(2.0) * A, r"use float\(weight\)"),
            (lambda A, C: 1 / A, r"damped_inverse\(C, damping\)"),
            (lambda A, C: A**0.5, r"matrix_power\(C, exponent\)"),
            (lambda A, C: A * "2", r"expected a number, got '2'"),
            (lambda A, C: A + None, r"expected another approximation, got None"),
        ],
    )
    def test_what_makes_no_sense_says_what_to_write(self, make, message):
        with pytest.raises(TypeError, match=message):
            make(KFAC(GGN()), DiagonalOperator(torch.ones(2)))

    @pytest.mark.parametrize("divisor", [0, 0.0, 1e-320, float("nan")])
    def test_divisors(self, divisor):
        with pytest.raises(ValueError, match="cannot be divided by"):
            KFAC(GGN()) / divisor
