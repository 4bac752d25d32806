"""The benchmark of preconditioners runs and counts what it should; times are never compared, since machines differ."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks.hessian_free import main


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hessian-free")
    words = ["--problem", "digits-autoencoder", "--examples", 60, "--iterations", 20, "--threads", 1]
    done = CliRunner().invoke(main, list(map(str, [*words, "--output", folder])))
    assert done.exit_code == 0, done.output
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


def test_every_preconditioner_trains_from_the_same_start(report):
    runs, _ = report
    assert list(runs) == ["none", "diagonal", "kfac", "ekfac", "none:martens"]
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
    runs, text = report
    assert f"| none | {runs['none'][0]['error']:.4g} |" in text
    last = runs["none"][-1]
    assert f"| {last['error']:.4g} ({last['iterations']}) | none | {last['iterations']} | 1.00 |" in text


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
