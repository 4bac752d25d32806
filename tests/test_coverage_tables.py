"""The tables of docs/coverage.md say what the code does; figures that depend on the machine are not compared."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script():
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
    assert cell(rows["Diagonal"], matrices["GGN"], "RNN") == "exact diagonal"
    assert cell(rows["KFAC"], matrices["Hessian"], "RNN") == "refused"
    assert float(cell(rows["KFAC"], matrices["GGN"], "RNN")) > 0.1


def test_every_row_has_its_figures(script):
    text = (DOCS / "coverage.md").read_text().split("## Memory and time")[1]
    for row in script["ROWS"]:
        assert f"| `{row.name}` | {row.memory} |" in text
