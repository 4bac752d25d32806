"""The table of errors of recurrent weights is made, and its numbers are those of the definition."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.recurrent_errors import APPROXIMATIONS, errors, main
from curvlib.experiments import PROBLEMS


@pytest.fixture(scope="module")
def lines():
    problem = PROBLEMS.get("rowwise-digits-rnn").with_options({"units": "4"})
    return list(errors(problem, problem.load(), steps=[0, 3], examples=40, seed=0))


def test_every_weight_is_compared_at_every_step(lines):
    assert {line.step for line in lines} == {0, 3}
    assert len({line.layer for line in lines}) == 2
    assert len(lines) == 4
    assert lines[0].loss != lines[2].loss


def test_errors_are_relative_and_chains_are_closer_than_independence(lines):
    for line in lines:
        assert set(line.by_approximation) == set(APPROXIMATIONS)
        assert all(0 < error < 2 for error in line.by_approximation.values())
        assert line.by_approximation["option 1"] < line.by_approximation["Independent"]


def test_bad_options_are_refused(monkeypatch):
    monkeypatch.delenv("CURVLIB_DATA", raising=False)
    threads = str(torch.get_num_threads())
    outcome = CliRunner().invoke(main, ["--problem", "rowwise-mnist-rnn", "--threads", threads])
    assert outcome.exit_code == 2
    assert "--data" in outcome.output
