"""The tables of docs/coverage.md say what the code does; figures that depend on the machine are not compared."""

import re
import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
# Bytes by the formula and of an estimate: what formulas may leave out.
FACTOR = 1.001


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return runpy.run_path(str(DOCS / "coverage.py"))


def cells(text):
    """Lines of tables, with errors as '#'."""
    return re.sub(r"\| \d+\.\d\d(?= \|)", "| #", text)


def test_the_tables_are_up_to_date(script):
    assert cells(script["tables"]()) in cells((DOCS / "coverage.md").read_text()), "run python docs/coverage.py"


def test_a_cell_can_say_anything(script):
    rows = {row.name: row for row in script["ROWS"]}
    cell, matrices = script["cell"], script["MATRICES"]
    assert cell(rows["Dense"], matrices["GGN"], "RNN") == "exact"
    assert cell(rows["BlockDiagonal"], matrices["GGN"], "RNN") == "exact blocks"
    assert cell(rows["Diagonal"], matrices["Hessian"], "RNN") == "exact diagonal"
    assert cell(rows["KFAC"], matrices["Hessian"], "RNN") == "refused"
    assert cell(rows["LBFGS"], matrices["Hessian"], "RNN") == "-"
    assert float(cell(rows["KFAC"], matrices["GGN"], "RNN")) > 0.1


def test_blocks_are_exact_in_the_partition_of_the_approximation_alone(script):
    judged, kept = script["judged"], script["_kept"]
    exact = script["_dense"](script["MATRICES"]["GGN"], "Linear chain")
    partitions = {row.partition for row in script["ROWS"]}
    assert len(partitions) == 3
    for own in partitions:
        mask = kept(own, "Linear chain")
        C = torch.where(mask, exact, 0.0)
        assert judged(C, exact, mask) == "exact blocks"
        for other in partitions - {own}:
            assert float(judged(C, exact, kept(other, "Linear chain"))) > 0
        missing = C.clone()
        missing[0, 1] = missing[1, 0] = 0.0
        assert float(judged(missing, exact, mask)) > 0


def test_every_row_has_its_figures_and_they_agree(script):
    """In the text, by formula at its sizes, and as measured: on another network, so that no formula fits by chance."""
    text = (DOCS / "coverage.md").read_text().split("## Memory and time")[1]
    objective, batch, sizes = script["chain"]((7, 5, 3), 20)
    told = script["Sizes"].of(*script["MEASURED"])
    for row in script["ROWS"]:
        (line,) = re.findall(rf"\| `{re.escape(row.name)}` \| {re.escape(row.memory)} \| (.*) \|", text)
        by_formula, came, time = line.split(" | ")[:3]
        assert time == row.time
        measured = script["memory"](row, objective, batch)
        if measured is None:
            assert (by_formula, came) == ("-", "-")
            continue
        for formula, bytes_of_estimate in (
            (4 * row.numbers(sizes), measured),
            (4 * row.numbers(told), int(came.replace(",", ""))),
        ):
            assert formula / FACTOR <= bytes_of_estimate <= formula * FACTOR, row.name
        assert int(by_formula.replace(",", "")) == 4 * row.numbers(told), row.name
