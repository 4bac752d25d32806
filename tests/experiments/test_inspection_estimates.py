"""A curvature beside its approximations by products alone, what an interruption leaves, and curves of eigenvalues."""

import numpy as np
import pytest
import torch
from inspected_models import evaluation, tiny, unsupported

import curvlib
from curvlib.experiments import ExperimentError, Inspection, StopInspection, inspect_evaluation, inspection_spectra
from curvlib.experiments.inspection import prepare
from curvlib.experiments.inspection_report import document, legend, remarks, results_table
from curvlib.experiments.inspection_run import product_seconds, products_of
from curvlib.spectra import SpectralDensity

NAMES = ("kfac", "diagonal", "unit-blocks", "identity")


def looked_at(of=None, report=lambda what, part: None, **changes):
    return inspect_evaluation(of if of is not None else evaluation(), Inspection(**changes), report)


@pytest.mark.parametrize(("matrix", "layers"), [("ggn", ()), ("fisher", ("0", "4"))], ids=["whole", "layers"])
def test_estimates_are_near_the_numbers_of_dense_matrices(matrix, layers):
    at, words = evaluation(l2=0.01), {"matrix": matrix, "layers": layers, "approximations": NAMES, "damping": 0.05}
    dense, estimated = looked_at(at, **words), looked_at(at, estimate=True, **words)
    assert estimated.exact is None
    assert estimated.diagonal_share is None
    for exact, row in zip(dense.rows, estimated.rows, strict=True):
        assert 0 < row.error_deviation < 0.2 * row.error
        assert row.error == pytest.approx(exact.error, abs=4 * row.error_deviation)
        # an eigenvalue is at least as near as the residual of its vector
        assert row.spectral_error == pytest.approx(exact.spectral_error, rel=0.02)
        # relative residuals of 1e-3 with a condition of at most 20
        assert row.step_cosine == pytest.approx(exact.step_cosine, abs=0.02)
        assert row.memory == exact.memory
        assert not list(estimated.drawn)
    assert "+-" in str(results_table(estimated).columns[1]._cells[0])
    assert "residual of 0.01" in legend(estimated)
    assert document(estimated, {}, [])["exact"]["eigenvalues"] is None


def test_estimates_take_the_mean_absolute_eigenvalue_as_damping_and_name_copies():
    for matrix, density in (("ggn", None), ("hessian", SpectralDensity(steps=40, probes=8))):
        words = {"matrix": matrix, "approximations": ("identity", "exact", "dense"), "density": density}
        seen, dense = looked_at(estimate=True, **words), looked_at(**words)
        assert seen.damping == pytest.approx(dense.damping, rel=0.15)
        assert (seen.density is None) == (density is None)
        rows = {row.name: row for row in seen.rows}
        assert rows["exact"].error == pytest.approx(0.0, abs=1e-6)
        assert rows["exact"].note.startswith("equal to the exact matrix")
        assert rows["dense"].same_as == "exact"


def test_an_indefinite_matrix_is_told_by_its_solves():
    seen = looked_at(matrix="hessian", approximations=("low-rank-alone",), estimate=True, damping=1e-9)
    assert "no damped step: conjugate gradients met negative curvature" in seen.note
    assert seen.rows[0].step_cosine is None


def test_estimates_need_no_limit_of_coordinates_and_tell_their_products():
    with pytest.raises(ExperimentError, match=r"more than --most 42.*or use --estimate"):
        prepare(evaluation(), Inspection(most=42))
    ask = Inspection(most=42, estimate=True, approximations=("kfac",))
    preparation = prepare(evaluation(), ask)
    assert preparation.selection.is_whole
    multiplied = []
    at = evaluation()
    product = type(at).product

    def counted(self, *arguments):
        multiplied.append(1)
        return product(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(at), "product", counted)
        inspect_evaluation(at, ask, lambda *_: None)
        assert 30 < len(multiplied) <= products_of(ask, preparation, evaluation())
    whole = Inspection(matrix="hessian", approximations=("diagonal", "unit-blocks", "identity"))
    assert products_of(whole, prepare(evaluation(), whole), evaluation()) == 3 * 43
    assert product_seconds(evaluation(), ask) > 0
    with pytest.raises(ExperimentError, match="makes no matrices, and so no inverses"):
        Inspection(estimate=True, inverses=True)


def test_estimates_of_nothing_are_refused():
    model, loss, (inputs, targets) = tiny()
    for broken, message in ((0.0 * inputs, "zero on these layers"), (inputs / 0.0, "cannot be made")):
        with torch.no_grad():
            model[2].bias.zero_(), model[0].bias.zero_(), model[4].weight.zero_()
        with pytest.raises(ExperimentError, match=message):
            looked_at(curvlib.Objective(model, loss).at((broken, targets)), layers=("0",), estimate=True)


def test_an_interruption_keeps_the_rows_that_are_done():
    def stop(name):
        def report(what, part):
            if what == name:
                raise StopInspection

        return report

    for estimate in (False, True):
        seen = looked_at(report=stop("diagonal"), approximations=NAMES, estimate=estimate)
        assert [row.name for row in seen.rows] == ["kfac"]
        assert seen.interrupted == NAMES[1:]
        assert "Interrupted: diagonal, unit-blocks, identity not looked at." in remarks(seen)
        for name in ("exact", "kfac"):
            with pytest.raises(StopInspection):
                looked_at(report=stop(name), approximations=NAMES, estimate=estimate)
    with pytest.raises(StopInspection):
        looked_at(evaluation(unsupported), report=stop("identity"), approximations=("kfac", "identity"))


def drawn_negatives(monkeypatch, seen):
    figures = []
    monkeypatch.setattr(inspection_spectra, "png_of", figures.append)
    inspection_spectra.spectra(seen, seen.exact)
    (axes,) = figures[0].axes
    return [line.get_ydata() for line in axes.lines if line.get_marker() == "." and len(line.get_ydata())], axes


def test_a_spectrum_of_one_point_has_a_marker(monkeypatch):
    model = torch.nn.Linear(1, 1, bias=False)
    one = curvlib.Objective(model, torch.nn.MSELoss()).at((torch.ones(3, 1), torch.zeros(3, 1)))
    for given, marked in (((one,), True), ((), False)):
        _, axes = drawn_negatives(monkeypatch, looked_at(*given, approximations=("kfac",)))
        curves = [line for line in axes.lines if line.get_label() in ("exact", "kfac")]
        assert [line.get_marker() == "o" for line in curves] == [marked, marked]


def test_rounding_errors_are_not_drawn_as_negative_eigenvalues(monkeypatch):
    model, loss, (inputs, targets) = tiny()
    single = curvlib.Objective(model.float(), loss).at((inputs.float(), targets))
    seen = looked_at(single, approximations=("kfac",))
    values = seen.exact.eigenvalues
    assert float(values.min()) < 0  # there are some to be left out
    assert seen.exact.rounding == pytest.approx(43 * 2**-23 * float(values.abs().max()))
    negatives, axes = drawn_negatives(monkeypatch, seen)
    assert not negatives
    assert any("d eps max = " in text.get_text() for text in axes.texts)
    seen = looked_at(matrix="hessian", approximations=("identity",))
    (drawn,), _ = drawn_negatives(monkeypatch, seen)
    values = seen.exact.eigenvalues.numpy()
    np.testing.assert_allclose(drawn, -values[values < -seen.exact.rounding])
