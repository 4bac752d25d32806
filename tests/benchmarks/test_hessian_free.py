"""The benchmark of preconditioners runs and counts what it should; times are never compared, since machines differ."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks.hessian_free import Point, main, shares


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hessian-free")
    return results(folder)[:2]


def results(folder, *more):
    """Return the numbers, the tables and what was shown of a short run."""
    words = ["--problem", "digits-autoencoder", "--examples", 60, "--iterations", 20, "--threads", 1, *more]
    done = CliRunner().invoke(main, list(map(str, [*words, "--output", folder])))
    assert done.exit_code == 0, done.output
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text(), done.stderr


def test_every_preconditioner_trains_from_the_same_start(report):
    assert list(report[0]) == ["0"]
    runs = report[0]["0"]
    assert list(runs) == ["none", "diagonal", "kfac", "ekfac", "kfac:shorter", "none:martens"]
    assert len({points[0]["error"] for points in runs.values()}) == 1
    assert len({points[1]["iterations"] for points in runs.values()}) > 1
    for points in runs.values():
        assert points[-1]["error"] < 0.8 * points[0]["error"]
        assert [point["step"] for point in points] == list(range(len(points)))
        # the budget, or the lowest error of the first run
        assert points[-1]["iterations"] >= 20 or points[-1]["error"] <= runs["none"][-1]["error"]
        assert points[-2]["iterations"] < 20
        for before, after in itertools.pairwise(points):
            assert after["iterations"] > before["iterations"]
            assert after["gradients"] - before["gradients"] > 4 / 3 * (after["iterations"] - before["iterations"])


def test_tables_show_the_errors(report):
    runs, text = report[0]["0"], report[1]
    assert f"| none | {runs['none'][0]['error']:.4g} |" in text
    last = runs["none"][-1]
    assert f"| {last['error']:.4g} ({last['iterations']}) | none | {last['iterations']} | 1.00 |" in text


def test_several_seeds_make_one_table_of_shares(tmp_path):
    words = ["--preconditioners", "none", "--preconditioners", "kfac", "--seed", 3, "--seed", 5, "--seed", 3]
    values, text, shown = results(tmp_path, *words)
    assert list(values) == ["3", "5"]  # once each
    shares = []
    for seed, runs in values.items():
        assert list(runs) == ["none", "kfac"]
        assert runs["kfac"][0]["error"] == runs["none"][0]["error"]
        lowest = min(runs["none"], key=lambda point: point["error"])
        reached = [point for point in runs["kfac"] if point["error"] <= lowest["error"]]
        shares += [reached[0]["iterations"] / lowest["iterations"]] if reached else []
        assert f"seed {seed}, kfac: Point(step=1," in shown
        assert f"Seed {seed}." in text
    assert values["3"]["none"][0]["error"] != values["5"]["none"][0]["error"]
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 of its steps | kfac |")]
    mean = f"{(shares[0] * shares[1]) ** 0.5:.2f}" if len(shares) == 2 else "-"
    assert row.startswith(f"| 1 of its steps | kfac | {mean} | {min(shares):.2f}, {max(shares):.2f} |")
    assert row.endswith(f"| {len(shares)} of 2 |")
    assert "| 1 of its steps | none | 1.00 | 1.00, 1.00 | 1.00 | 1.00, 1.00 | 2 of 2 |" in text


def test_a_seed_that_does_not_come_so_far_leaves_no_mean():
    def points(*errors):
        return [
            Point(step=n, iterations=4 * n, gradients=8.0 * n, seconds=0.0, loss=0.0, error=error, damping=1.0)
            for n, error in enumerate(errors)
        ]

    runs = {0: {"none": points(9, 5, 2), "kfac": points(9, 1)}, 1: {"none": points(9, 5, 2), "kfac": points(9, 3, 3)}}
    table = shares(runs)
    assert "| 1 of its steps | kfac | - | 0.50, 0.50 | - | 0.50, 0.50 | 1 of 2 |" in table
    # after one step of two, whose error both reach in their first
    assert "| 0.5 of its steps | kfac | 1.00 | 1.00, 1.00 | 1.00 | 1.00, 1.00 | 2 of 2 |" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problem", "digits-classifier"], "is no auto-encoder"),
        (["--problem", "digits-autoencoder", "--preconditioners", "none:martin"], "did you mean 'martens'"),
        (["--problem", "digits-autoencoder", "--examples", "2000"], "has 1500 training images"),
        (["--problem", "digits-autoencoder", "--preconditioners", "kfca"], "did you mean 'kfac'"),
    ],
)
def test_wrong_options_are_refused(words, message, tmp_path):
    done = CliRunner().invoke(main, [*words, "--threads", "1", "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert torch.get_num_threads() == 1
