"""Tables and picture: what they compare, that no number is cut short, that every method is seen."""

import dataclasses
import io
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from small_comparisons import comparison_of, record

from curvlib.experiments import METHODS, PROBLEMS, CurvatureChoice, Status, configure, figure_png, results_tables
from curvlib.experiments.listing import methods_table, problems_table
from curvlib.experiments.options import options_of
from curvlib.experiments.report import common_loss, legend, summarise

LONG = configure("kfac", PROBLEMS.get("digits-autoencoder"), {}).with_curvature(
    CurvatureChoice(approximation="block-diagonal", matrix="empirical-fisher")
)


def printed(*things, width):
    console = Console(width=width, file=io.StringIO())
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_summary_compares_at_the_loss_that_all_methods_reached():
    comparison = comparison_of("kfac", "sgd", "adam")
    records = [
        *[record("kfac", seconds, loss) for seconds, loss in ((0, 9), (1, 4), (2, 1))],
        *[record("sgd", seconds, loss) for seconds, loss in ((0, 9), (1, 5), (2, 3), (3, 4))],
        *[record("adam", seconds, loss) for seconds, loss in ((0, 9), (1, 2))],
        record("adam", 2, None, Status.DIVERGED),
    ]
    assert common_loss(comparison, records) == 3
    assert [s.seconds_to_common_loss for s in summarise(comparison, records)] == [2, 2, None]
    (table,) = results_tables(comparison, records, width=140)
    cells = {column.header: [str(cell) for cell in column.cells] for column in table.columns}
    assert cells["method"] == ["kfac unfinished", "sgd unfinished", "adam diverged"]
    assert cells["loss"] == ["*1.000", "4.000", "-"]
    assert cells["seconds to\n3.000"] == ["*2.0", "*2.0", "-"]
    assert "seconds to" in legend(comparison)


def test_numbers_of_a_column_have_the_same_decimals():
    def losses(*values):
        comparison = comparison_of("kfac", "sgd", "adam")
        records = [record(method.name, 1, loss) for method, loss in zip(comparison.methods, values, strict=True)]
        return [str(cell) for cell in results_tables(comparison, records, width=140)[0].columns[1].cells]

    assert losses(13.6, 15.123456, 120.0) == ["*13.60", "15.12", "120.00"]
    assert losses(0.00123, 2.0, 0.5) == ["*0.001230", "2.000000", "0.500000"]
    assert losses(0.0, 0.25, None) == ["*0.0000", "0.2500", "-"]
    assert losses(1e-9, 3e12, 1.0) == ["*1.000e-09", "3.000e+12", "1.000e+00"]


values = st.none() | st.floats(1e-30, 1e30)


@settings(max_examples=60)
@given(losses=st.lists(values, min_size=3, max_size=3), seconds=st.floats(1, 1e5), width=st.sampled_from([60, 80, 100]))
def test_no_cell_is_cut_short_on_a_narrow_terminal(losses, seconds, width):
    comparison = comparison_of("kfac", "hessian-free", "adam")
    comparison = dataclasses.replace(comparison, methods=(LONG, *comparison.methods[1:]))
    records = []
    for method, loss in zip(comparison.methods, losses, strict=True):
        records += [record(method.name, 0, 5.0), record(method.name, seconds, loss)]
    tables = results_tables(comparison, records, width=width)
    text = printed(*tables, width=width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    words = set(re.findall(r"[^\s│]+", text))
    wide = results_tables(comparison, records, width=1000)
    assert len(wide) == 1 < len(tables) + (width == 100)
    for column in wide[0].columns:
        assert {word for cell in column.cells for word in str(cell).split()} <= words
        assert set(column.header.split()) <= words


@pytest.mark.parametrize("width", [80, 140])
def test_lists_of_problems_and_methods_are_not_cut_short(width):
    for name, problem in PROBLEMS.items():
        text = printed(methods_table(problem), width=width)
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
        assert max(len(line) for line in text.splitlines()) <= width
        for method, cls in METHODS.items():
            for entry in options_of(cls):
                value = getattr(configure(method, problem, {}), entry.name)
                shown = "auto" if value is None else value if isinstance(value, str) else f"{value:g}"
                assert re.search(rf"│ {method}\.{entry.name} +│ +{re.escape(shown)} │", text)
        text = printed(problems_table(), width=width)
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
        assert max(len(line) for line in text.splitlines()) <= width
        assert problem.network.parameters is None or f"{problem.network.parameters:,}" in text
        assert all(f"--set problem.{entry.name}={value}" in text for entry, value in problem.options())
        assert name in text


def curves_of(monkeypatch, comparison, records):
    """Return (axes, their lines by label) of the picture."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    figure_png(comparison, records)
    return [(axes, {line.get_label(): line.get_xydata().tolist() for line in axes.lines}) for axes in figures[0].axes]


def test_figure_shows_every_method(monkeypatch):
    comparison = comparison_of("kfac", "sgd")
    kfac = [record("kfac", seconds, 10.0 / (1 + seconds)) for seconds in range(5)]
    sgd = [record("sgd", seconds, 9.0 / (1 + seconds)) for seconds in range(4)]
    one, two = figure_png(comparison, kfac), figure_png(comparison, kfac + sgd)
    assert one[:8] == two[:8] == b"\x89PNG\r\n\x1a\n"
    assert one != two
    assert figure_png(comparison, [])[:4] == b"\x89PNG"
    panels = curves_of(monkeypatch, comparison, kfac + sgd)
    assert [axes.get_xlabel() for axes, _ in panels] == [
        "iterations",
        "seconds of training",
        "work, in gradients of all training examples",
    ]
    for axes, lines in panels:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        # What has no place on a logarithmic axis, the start, is left out.
        assert lines["kfac"] == [[r.seconds, r.loss] for r in kfac[1:]]
        assert lines["sgd"] == [[r.seconds, r.loss] for r in sgd[1:]]


@pytest.mark.parametrize(
    "records",
    [
        [record("kfac", 0, 3.0)],
        [record("kfac", 0, 3.0), record("kfac", 2, None, Status.DIVERGED)],
        [record("kfac", 0, 3.0), record("kfac", 2, -1.0), record("sgd", 1, 2.0)],
    ],
    ids=["start alone", "diverged at once", "negative"],
)
def test_figure_of_what_fits_no_logarithmic_axis(monkeypatch, records):
    comparison = comparison_of("kfac", "sgd")
    assert figure_png(comparison, records).startswith(b"\x89PNG")
    axes, lines = curves_of(monkeypatch, comparison, records)[1]
    legend_texts = [text.get_text() for text in axes.get_figure(root=True).legends[0].get_texts()]
    assert legend_texts[0] == ("kfac (diverged)" if records[-1].loss is None else "kfac")
    assert axes.get_yscale() == "linear"
    assert [point for line in lines.values() for point in line] == [[r.seconds, r.loss] for r in records[1:] if r.loss]


def test_figure_and_table_show_damping_ratio_and_solver(monkeypatch):
    comparison = comparison_of("hessian-free", "sgd")
    told = [(20.0, -3.0, 12), (10.0, 0.9, 30), (5.0, 7.0, 90)]
    records = [record("hessian-free", 0, 9.0), record("sgd", 0, 9.0), record("sgd", 4, 2.0)]
    for step, (damping, ratio, iterations) in zip((1, 2, 5), told, strict=True):
        own = record("hessian-free", step, 9.0 / (1 + step))
        records.append(
            dataclasses.replace(own, damping=damping, ratio=ratio, solver_iterations=iterations, accepted=True)
        )
    panels = curves_of(monkeypatch, comparison, records)
    drawn = {axes.get_ylabel(): lines["hessian-free"] for axes, lines in panels[3:] if "hessian-free" in lines}
    assert drawn == {
        "damping": [[1, 20.0], [2, 10.0], [5, 5.0]],
        # within the limits of the panel
        "actual / predicted reduction": [[1, -0.5], [2, 0.9], [5, 2.0]],
        # of the steps since the last record
        "solver iterations a step": [[1, 12.0], [2, 18.0], [5, 20.0]],
    }
    assert all("sgd" not in lines for _, lines in panels[3:])
    (table,) = results_tables(comparison, records, width=200)
    cells = {column.header: [str(cell) for cell in column.cells] for column in table.columns}
    assert cells["solver\niterations"] == ["90", "-"]


@pytest.mark.parametrize(
    "iterations",
    [[6, 7, 6], [6, 6, 6], [1, 1, 1], [1, 2, 9], [40, 38, 44], [3, 30, 290]],
    ids=lambda counts: "-".join(map(str, counts)),
)
def test_counts_have_whole_numbers_at_their_ticks(monkeypatch, iterations):
    comparison = comparison_of("hessian-free")
    records = [record("hessian-free", 0, 9.0)]
    for step, total in enumerate(itertools.accumulate(iterations), start=5):
        own = record("hessian-free", step, 9.0 / step)
        total += 5 * iterations[0] - iterations[0]  # the first record is of five steps
        records.append(dataclasses.replace(own, solver_iterations=total, damping=1.0 / step, ratio=1.0))
    for axes, lines in curves_of(monkeypatch, comparison, records):
        counts = [axes.xaxis] if axes.get_xlabel() == "iterations" else []
        if axes.get_ylabel() == "solver iterations a step":
            counts.append(axes.yaxis)
            assert [y for _, y in lines["hessian-free"]] == iterations
        for axis in counts:
            low, high = axis.get_view_interval()
            ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
            assert len(ticks) >= 2
            assert all(tick == round(tick) for tick in ticks)
            assert [axis.get_major_formatter()(tick) for tick in ticks] == [str(round(tick)) for tick in ticks]
