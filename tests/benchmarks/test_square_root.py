"""The benchmark of least-squares methods: its solution is the dense one, both methods get there, the table is whole."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.square_root import ITERATIONS, System, main


def test_both_methods_find_the_dense_solution():
    system = System.draw(12, 5, 0.1, 0.01, torch.Generator().manual_seed(0))
    C = system.V @ system.V.T
    x = torch.linalg.solve(C + 0.01 * torch.eye(12, dtype=torch.float64), system.V @ system.y)
    torch.testing.assert_close(system.x, x, rtol=1e-9, atol=1e-11)
    values = torch.linalg.svdvals(system.V)
    assert (float(values[0]), float(values[-1])) == (pytest.approx(1.0), pytest.approx(0.1))
    for method in (system.by_conjugate_gradients, system.by_lsmr):
        assert method(2, torch.float64) > 1e-3
        # R + 1 iterations are exact but for rounding errors: the condition number of C + damping I is 101.
        assert method(8, torch.float64) < 1e-10
        assert 1e-9 < method(8, torch.float32) < 1e-4


def test_the_table_has_nine_rows():
    done = CliRunner().invoke(main, ["--size", "12", "--rank", "4", "--dtype", "float64"])
    assert done.exit_code == 0, done.output
    rows = [line.strip("| ").split(" | ") for line in done.output.splitlines()[2:]]
    assert [len(row) for row in rows] == [2 + len(ITERATIONS)] * 9
    assert all(float(error) < 1e-6 for error in rows[0][-1].split(" / "))
