"""A curvature beside its approximations: every number against dense matrices, selections, refusals."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from inspected_models import SIZES, evaluation, tiny, unsupported
from torch import nn

import curvlib
from curvlib.approximations import KFAC, Dense
from curvlib.experiments import (
    ExperimentError,
    Inspection,
    inspect_evaluation,
    inspection_choice,
    inspection_memory,
    results_table,
)
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.inspection import prepare
from curvlib.experiments.inspection_matrix import MOST_PIXELS, picture_of
from curvlib.experiments.inspection_report import document, remarks
from curvlib.experiments.inspection_selection import select
from curvlib.operators import MatrixFree
from curvlib.spectra import SpectralDensity


def looked_at(of=None, **changes):
    progress = []
    result = inspect_evaluation(
        of if of is not None else evaluation(), Inspection(**changes), lambda what, part: progress.append((what, part))
    )
    assert all(0.0 <= part <= 1.0 for _, part in progress)
    return result


def row_of(inspected, name):
    return next(row for row in inspected.rows if row.name == name)


def places(layers):
    """Where the weights of the tiny model's layers lie, column by column, the bias last."""
    found, start = [], 0
    for name, (rows, columns) in {"0": (4, 4), "2": (3, 4), "4": (2, 3)}.items():
        if name in layers:
            for column in range(columns + 1):
                for row in range(rows):
                    weight = start + row * columns + column
                    found.append(weight if column < columns else start + rows * columns + row)
        start += rows * (columns + 1)
    return np.array(found)


def generator():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize(
    ("matrix", "layers"),
    [("ggn", "024"), ("fisher", "24"), ("empirical-fisher", "2"), ("ggn", "04")],
    ids=lambda value: value,
)
def test_every_number_is_that_of_dense_matrices(matrix, layers):
    at, damping = evaluation(l2=0.01), 0.03
    seen = looked_at(at, matrix=matrix, layers=tuple(layers), damping=damping, inverses=True, seed=5)
    S = places(layers)
    of = INSPECTED_MATRICES.get(matrix)
    C = Dense(of).estimate(at, generator()).to_dense().numpy()[np.ix_(S, S)]
    g, eye = at.gradient().numpy()[S], np.eye(len(S))
    step = -np.linalg.solve(C + damping * eye, g)
    np.testing.assert_allclose(seen.exact.eigenvalues.numpy(), np.linalg.eigvalsh(C)[::-1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.exact.picture.numpy(), np.abs(C), rtol=1e-6, atol=1e-9)
    assert [row.name for row in seen.rows] == [
        name for name in INSPECTED_APPROXIMATIONS if name not in ("exact", "dense", "full-rank")
    ]
    assert sum(row.reason is None for row in seen.rows) >= 7
    for row in seen.rows:
        if row.reason is not None:
            continue
        B = INSPECTED_APPROXIMATIONS.get(row.name)(of).estimate(at, generator()).to_dense().numpy()[np.ix_(S, S)]
        expected = {
            "error": np.linalg.norm(B - C) / np.linalg.norm(C),
            "spectral_error": np.linalg.norm(B - C, 2) / np.linalg.norm(C, 2),
        }
        if np.linalg.eigvalsh(B)[0] > -damping:
            inverse = np.linalg.inv(C + damping * eye)
            difference = np.linalg.inv(B + damping * eye) - inverse
            expected["inverse_error"] = np.linalg.norm(difference) / np.linalg.norm(inverse)
            other = -np.linalg.solve(B + damping * eye, g)
            expected["step_cosine"] = other @ step / np.linalg.norm(other) / np.linalg.norm(step)
        else:
            assert row.name == "hutchinson-diagonal"
            assert "not positive definite" in row.note
        for key, value in expected.items():
            assert getattr(row, key) == pytest.approx(value, rel=1e-7, abs=1e-9), (row.name, key)
        start = 0
        for error, name in zip(row.layer_errors, layers, strict=True):
            part = slice(start, start + SIZES[name])
            own = np.linalg.norm((B - C)[part, part]) / np.linalg.norm(C[part, part])
            assert error == pytest.approx(own, rel=1e-7, abs=1e-9)
            start += SIZES[name]
        np.testing.assert_allclose(row.looked.eigenvalues.numpy(), np.linalg.eigvalsh(B)[::-1], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(row.looked.picture.numpy(), np.abs(B), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(row.looked.difference.numpy(), np.abs(B - C), rtol=1e-6, atol=1e-8)


def test_damping_is_the_mean_eigenvalue_and_blocks_hold_their_share():
    at = evaluation()
    seen = looked_at(at, layers=("0", "2"))
    S = places(("0", "2"))
    C = Dense(curvlib.GGN()).estimate(at).to_dense().numpy()[np.ix_(S, S)]
    assert seen.damping == pytest.approx(np.trace(C) / len(C))
    inside = np.square(C[:20, :20]).sum() + np.square(C[20:, 20:]).sum()
    assert seen.diagonal_share == pytest.approx(inside / np.square(C).sum())


def test_kfac_is_drawn_as_squares_of_one_factor():
    at = evaluation()
    picture = row_of(looked_at(at, layers=("2",), approximations=("kfac",)), "kfac").looked.picture
    # A (x) G: the square of two inputs is a multiple of that of the biases, which is G itself
    squares = picture.view(5, 3, 5, 3).transpose(1, 2).reshape(25, 9)
    parts = squares / squares[-1]
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts), rtol=1e-4, atol=1e-6)


def test_block_diagonal_is_exact_in_its_blocks_and_copies_are_named():
    seen = looked_at()
    assert row_of(seen, "block-diagonal").layer_errors == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    assert row_of(seen, "kfac-reduce").same_as == "kfac"
    assert row_of(seen, "kfac").same_as is None
    assert "kfac-reduce" not in [row.name for row, _ in seen.drawn]
    copies = "kfac-reduce, kfac-symmetric-chain, kfac-general-chain, kfac-independent have the same entries as kfac"
    assert any(copies in line for line in remarks(seen))


def test_the_matrix_itself_has_no_error():
    seen = looked_at(approximations=("dense", "exact"))
    for row in seen.rows:
        assert row.error == pytest.approx(0.0, abs=1e-12)
        assert row.step_cosine == pytest.approx(1.0)
    assert [row.memory for row in seen.rows] == [8 * 43**2, None]


def test_memory_is_counted_in_numbers_of_the_operator():
    seen = looked_at(approximations=("kfac", "diagonal", "identity"))
    factors = 5**2 + 4**2 + 5**2 + 3**2 + 4**2 + 2**2
    assert [row.memory for row in seen.rows] == [8 * factors, 8 * 43, 0]
    assert all(row.seconds > 0 for row in seen.rows)


def test_only_selected_columns_are_multiplied():
    multiplied = []
    matrix = torch.diag(torch.arange(43.0)) + 1.0

    def matmat(V):
        multiplied.append(V.shape[1])
        return matrix @ V

    selection = select(evaluation(), ("2",), 100)
    S = torch.from_numpy(places(("2",)))
    submatrix = selection.submatrix(MatrixFree(matmat, 43, torch.float32, torch.device("cpu")), lambda part: None)
    torch.testing.assert_close(submatrix, matrix[S][:, S].double())
    assert sum(multiplied) == 15


def test_layers_are_selected_by_name_and_pattern_in_the_order_of_the_model():
    at = evaluation()
    for patterns, names in (((), ["0", "2", "4"]), (("4", "0"), ["0", "4"]), (("[24]",), ["2", "4"])):
        assert [region.name for region in select(at, patterns, 43).regions] == names
    assert select(at, (), 43).is_whole
    assert not select(at, ("0", "2"), 43).is_whole


def test_selections_that_do_not_fit_are_refused_with_the_remedy():
    at = evaluation()
    with pytest.raises(ExperimentError, match=r"All layers have 43 coordinates, more than --most 42.*--layers 0,2"):
        select(at, (), 42)
    with pytest.raises(ExperimentError, match=r"--layers 2,4, raise .*Layers: 0 \(20\), 2 \(15\), 4 \(8\)\."):
        select(at, ("0", "2"), 25)
    with pytest.raises(ExperimentError, match=r"Choose fewer with --layers 2, raise"):
        select(at, ("0", "2"), 16)
    with pytest.raises(ExperimentError, match=r"The smallest layer is 4 with 8: choose it with --layers and raise"):
        select(at, (), 7)
    with pytest.raises(ExperimentError, match=r"--layers head fits no layer\. Layers: 0 \(20\)"):
        select(at, ("0", "head"), 100)


def test_an_approximation_that_does_not_apply_is_a_row_with_its_reason():
    seen = looked_at(evaluation(unsupported))
    assert [region.name for region in seen.selection.regions] == ["0", "2", "1.factor"]
    row = row_of(seen, "kfac")
    assert "1.factor" in row.reason
    assert row.error is None
    assert any(line.startswith("kfra does not apply: ") for line in remarks(seen))
    assert row_of(seen, "identity").reason is None
    both = looked_at(matrix="hessian", approximated="ggn", damping=10.0, approximations=("kfac",))
    assert both.rows[0].reason is None
    assert both.rows[0].step_cosine > 0


@pytest.mark.parametrize("choice", ["diagonal", "dense", "exclude"])
def test_parameters_outside_every_layer_get_what_was_asked(choice):
    at, names = evaluation(unsupported), ("kfac", "block-diagonal", "root-diagonal", "kfra")
    seen = looked_at(at, approximations=names, on_unsupported=choice, damping=0.1)
    S, C = slice(16 + 10, 30), Dense(curvlib.GGN()).estimate(at).to_dense()[16:20, 16:20]
    own = {"diagonal": C.diag().diag(), "dense": C, "exclude": torch.zeros(4, 4)}[choice]
    for name in ("kfac", "block-diagonal"):
        row = row_of(seen, name)
        torch.testing.assert_close(row.looked.picture[S, S], own.abs().float(), rtol=1e-4, atol=1e-7)
        assert "outside every layer, 1.factor: " in row.note
    assert ("no dense blocks" in (row_of(seen, "root-diagonal").reason or "")) == (choice == "dense")
    assert "1.factor" in row_of(seen, "kfra").reason
    assert document(seen, {}, [])["on_unsupported"] == choice
    assert not any("--on-unsupported" in line for line in remarks(seen))


def test_a_refusal_tells_the_remedy_and_whether_it_matters_here():
    for layers, indifferent in (((), False), (("0", "2"), True)):
        seen = looked_at(evaluation(unsupported), approximations=("kfac", "kfra", "identity"), layers=layers)
        told = next(line for line in remarks(seen) if "--on-unsupported" in line)
        assert told.startswith("kfac left out, because of parameters outside every layer (1.factor: no layer rule")
        assert ("the errors are the same" in told) == indifferent
    errors = [
        looked_at(evaluation(unsupported), approximations=("kfac",), layers=("0", "2"), on_unsupported=choice)
        .rows[0]
        .error
        for choice in ("dense", "exclude")
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_nothing_left_to_look_at_is_an_error_before_the_work():
    progress = []
    with pytest.raises(ExperimentError, match=r"(?s)of hessian.*kfac: KFAC needs vectors.*ekfac: EKFAC needs vectors"):
        inspect_evaluation(
            evaluation(),
            Inspection(matrix="hessian", approximations=("kfac", "ekfac")),
            lambda what, part: progress.append(what),
        )
    assert not progress
    recurrent = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 1))
    at = curvlib.Objective(recurrent, nn.MSELoss()).at((torch.ones(3, 1, 3), torch.ones(3, 1)))
    with pytest.raises(ExperimentError, match=r"(?s)No approximation is left.*kfac-tridiagonal: "):
        looked_at(at, approximations=("kfac-tridiagonal",))


def test_one_product_for_each_parameter_is_refused_for_large_models(monkeypatch):
    monkeypatch.setattr(inspection_memory, "_MOST_PRODUCTS", 42)
    names = ("dense", "diagonal", "low-rank", "hutchinson-diagonal")
    for matrix, refused in (("hessian", names[:3]), ("ggn", names[:1])):
        seen = looked_at(matrix=matrix, approximations=names)
        assert tuple(row.name for row in seen.rows if "43 products" in (row.reason or "")) == refused
    monkeypatch.setattr(inspection_memory, "_MOST_PRODUCTS", 43)
    assert looked_at(matrix="hessian", approximations=("diagonal",)).rows[0].reason is None


def test_the_hessian_has_its_own_approximations():
    seen = looked_at(matrix="hessian", damping=10.0)
    reasons = {row.name: row.reason for row in seen.rows}
    shown = {name for name, reason in reasons.items() if reason is None}
    assert shown >= {
        "diagonal", "block-diagonal", "unit-blocks", "parameter-blocks", "identity", "hutchinson-diagonal",
        "adahessian-diagonal", "low-rank-alone", "low-rank-estimated", "low-rank-lanczos",
    }  # fmt: skip
    assert row_of(seen, "block-diagonal").layer_errors == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    assert "products only" in reasons["kfac"]
    C = Dense(curvlib.Hessian()).estimate(evaluation()).to_dense()
    expected = float((C - C.diag().diag()).norm() / C.norm())
    assert row_of(seen, "diagonal").error == pytest.approx(expected)


def test_what_there_is_no_memory_for_is_refused_before_the_work(monkeypatch):
    # 8 matrices of 43 x 43 in float64, and 4 blocks of 43 unit vectors in float32
    needed = 8 * 8 * 43**2 + 4 * 4 * 43 * 64
    monkeypatch.setattr(inspection_memory, "available_bytes", lambda device: needed)
    assert prepare(evaluation(), Inspection(approximations=("kfac",))).memory == needed
    monkeypatch.setattr(inspection_memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(ExperimentError, match=r"43 coordinates would take about 162 kB, more than the .* --layers"):
        prepare(evaluation(), Inspection(approximations=("kfac",)))
    assert prepare(evaluation(), Inspection(approximations=("kfac",), layers=("2",))).memory < needed


def test_approximations_of_another_matrix_are_held_against_the_exact_one():
    at = evaluation()
    C, B = (Dense(m).estimate(at).to_dense() for m in (curvlib.GGN(), curvlib.EmpiricalFisher()))
    row = looked_at(at, approximated="empirical-fisher", approximations=("dense",)).rows[0]
    assert row.error == pytest.approx(float((B - C).norm() / C.norm()))
    seen = looked_at(at, approximated="empirical-fisher", approximations=("dense",), layers=("0", "4"))
    told = "Approximations of empirical-fisher beside the exact ggn, on 28 of 43 parameters, in layers 0, 4"
    assert results_table(seen).title == told


def test_an_indefinite_matrix_has_no_damped_step_and_says_so():
    seen = looked_at(matrix="hessian", approximated="ggn", damping=1e-9, inverses=True, approximations=("kfac",))
    assert float(seen.exact.eigenvalues[-1]) < -1e-9
    assert "not positive definite" in seen.note
    assert seen.rows[0].step_cosine is None
    assert seen.rows[0].inverse_error is None
    assert seen.exact.inverse_picture is None
    assert seen.rows[0].error > 0


def test_the_ways_to_treat_unsupported_parameters_are_those_of_the_approximations():
    assert get_args(get_type_hints(KFAC)["on_unsupported"]) == inspection_choice.ON_UNSUPPORTED


def test_blocks_that_would_take_the_machine_down_are_not_tried(monkeypatch):
    monkeypatch.setattr(inspection_memory, "_MOST_BYTES", 8 * (20**2 + 15**2 + 8**2) - 1)
    seen = looked_at(approximations=("block-diagonal", "unit-blocks", "dense", "parameter-blocks", "kfac"))
    assert [row.reason is None for row in seen.rows] == [False, True, False, True, True]
    assert seen.rows[0].reason.startswith("its matrices would take 5.51 kB for the whole model")
    monkeypatch.setattr(inspection_memory, "_MOST_BYTES", 8 * (20**2 + 15**2 + 8**2))
    assert looked_at(approximations=("block-diagonal",)).rows[0].reason is None


def test_the_density_of_the_whole_is_made_where_layers_are_left_out():
    density = SpectralDensity(steps=5, probes=2)
    assert looked_at(density=density, approximations=("kfac",)).density is None
    seen = looked_at(density=density, layers=("2",), approximations=("kfac",))
    assert seen.density.size == seen.rows[0].density.size == 43
    assert looked_at(layers=("2",), approximations=("kfac",)).density is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": "ggm"}, "did you mean 'ggn'"),
        ({"approximated": "x"}, "Unknown curvature matrix 'x'"),
        ({"approximations": ("diagnoal",)}, "did you mean 'diagonal'"),
        ({"approximations": ("kfac", "kfac")}, "looked at once"),
        ({"on_unsupported": "skip"}, "must be one of raise, diagonal, dense, exclude, got 'skip'"),
        ({"most": 0}, "most must be at least 1"),
        ({"damping": 0.0}, "damping must be a finite number above 0"),
        ({"damping": math.inf}, "damping must be a finite number above 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ExperimentError, match=message):
        Inspection(**changes)


def test_an_exact_matrix_that_cannot_be_made_is_an_error():
    model, loss, (inputs, targets) = tiny()
    with pytest.raises(ExperimentError, match="cannot be made of this model"):
        looked_at(curvlib.Objective(model, loss).at((inputs / 0.0, targets)))
    dead = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    with pytest.raises(ExperimentError, match="zero on these layers"):
        looked_at(curvlib.Objective(dead, nn.MSELoss()).at((torch.ones(3, 2), torch.ones(3, 2))), layers=("0",))


def test_an_error_of_curvlib_itself_is_not_taken_for_a_reason(monkeypatch):
    def broken(*_):
        raise AttributeError("oops")

    monkeypatch.setattr(inspection_choice, "check_cost", broken)
    with pytest.raises(AttributeError):
        looked_at(approximations=("kfac",))


def test_pictures_average_absolute_values_over_pixels():
    size = 2 * MOST_PIXELS + 3
    C = torch.randn(size, size, dtype=torch.float64)
    picture = picture_of(C)
    assert picture.shape == (-(-size // 3),) * 2
    assert float(picture[0, 1]) == pytest.approx(float(C[:3, 3:6].abs().mean()))
    assert float(picture[-1, -1]) == pytest.approx(float(C[3 * 287 :, 3 * 287 :].abs().mean()), rel=1e-5)
    small = torch.randn(5, 5, dtype=torch.float64)
    torch.testing.assert_close(picture_of(small), small.abs().float())


def test_the_document_holds_every_number():
    seen = looked_at(approximations=("kfac", "diagonal"), layers=("2", "4"), damping=0.1)
    told = document(seen, {"seed": "0"}, ["a.png"])
    assert told["layers"] == [{"name": "2", "size": 15}, {"name": "4", "size": 8}]
    assert told["damping"] == 0.1
    assert told["approximations"][0]["error"] == seen.rows[0].error
    assert len(told["exact"]["eigenvalues"]) == len(told["approximations"][1]["eigenvalues"]) == 23
    assert results_table(seen).row_count == 2
