"""The benchmark of trust regions runs and counts what it should; times are never compared, since machines differ."""

import json

import pytest
from click.testing import CliRunner

from benchmarks.trust_regions import MARKS, RUNS, main


def results(folder, *more):
    """Return the numbers and the tables of a short run."""
    words = ["--problem", "digits-autoencoder", "--examples", 60, "--gradients", 60, "--threads", 1, *more]
    done = CliRunner().invoke(main, list(map(str, [*words, "--output", folder])))
    assert done.exit_code == 0, done.output
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


@pytest.mark.slow
def test_every_run_has_the_same_work(tmp_path):
    values, text = results(tmp_path, "--seed", 3, "--seed", 5, "--seed", 3)
    assert list(values) == list(RUNS)
    assert len({run["iterations"] for runs in values.values() for run in runs}) > len(RUNS) / 2
    for name, runs in values.items():
        assert len(runs) == 2  # a seed once
        for run in runs:
            assert run["gradients"] >= 60
            assert len(run["errors"]) == len(MARKS)
            assert run["errors"][-1] < run["errors"][0] or run["steps"] < 4
            assert run["rejected"] < run["steps"] < 60
        low, high = sorted(run["errors"][-1] for run in runs)
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {(low + high) / 2:.3g} | {low:.3g} to {high:.3g} |" in row
        steps = (runs[0]["steps"] + runs[1]["steps"]) / 2
        assert f"| {steps:.0f} |" in row


def test_some_runs_alone_and_what_does_not_fit(tmp_path):
    values, _ = results(tmp_path, "--seed", 0, "--only", "GGN, K-FAC, its norm")
    (name,) = values
    assert name == "trust region, GGN, K-FAC, its norm"
    for option in (("--floor", 1.0), ("--radius", 0.1)):
        other, _ = results(tmp_path, "--seed", 0, "--only", name, *option)
        assert other[name][0]["errors"] != values[name][0]["errors"]
    for words, message in (
        (["--only", "nothing"], "fits none"),
        (["--problem", "digits-classifier"], "is no auto-encoder"),
        (["--examples", 10**6], "training images"),
    ):
        failed = CliRunner().invoke(main, list(map(str, [*words, "--output", tmp_path])))
        assert failed.exit_code == 2
        assert message in failed.output
