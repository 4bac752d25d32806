"""The benchmark of single systems: model values are those of the iterates, and tables count iterations to them."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.preconditioned_systems import main, model_values
from curvlib.operators import Dense, Diagonal


def test_values_are_those_of_the_model():
    torch.manual_seed(0)
    M, g = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    C = Dense(M @ M.T)
    values = model_values(C, 0.5, g, None, 30)
    A = C.to_dense() + 0.5 * torch.eye(6, dtype=torch.float64)
    step = -float(g @ g / (g @ A @ g))  # the first iterate is the Cauchy point
    assert values[:2] == pytest.approx([0.0, 0.5 * step * float(g @ g)])
    assert values[-1] == pytest.approx(float(-0.5 * g @ torch.linalg.solve(A, g)), rel=1e-6)
    assert values == sorted(values, reverse=True)
    assert len(model_values(Diagonal(torch.ones(6, dtype=torch.float64)), 0.5, g, None, 30)) == 2


def test_the_table_has_a_row_for_each(tmp_path):
    words = ["--problem", "digits-autoencoder", "--examples", "30", "--steps", "0", "--dampings", "1", "--threads", "1"]
    done = CliRunner().invoke(main, [*words, "--iterations", "8", "--only", "none", "--only", "K-FAC, 1 "])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines() if line.startswith(("| none", "| K-FAC"))]
    assert [len(row) for row in rows] == [7, 7]
    assert int(rows[0][1]) >= 1
