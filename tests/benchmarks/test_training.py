"""The training benchmark runs and counts what it should; times are never compared, since machines differ."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.training import main

ROOT = Path(__file__).resolve().parents[2]


def training(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("CURVLIB_DATA", None)
    command = [sys.executable, "-m", "benchmarks.training", "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run on the small digits, with a target that good learning rates reach and bad ones do not."""
    folder = tmp_path_factory.mktemp("training")
    words = ("--problem", "digits-convnet", "--methods", "sgd", "--methods", "adam", "--batch-sizes", 100)
    limits = ("--target", 0.6, "--max-steps", 22, "--every", 5, "--seeds", 2, "--output", folder)
    done = training(*words, *limits)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text(), done


def test_every_setting_is_trained_from_every_seed(report):
    values, _, done = report
    trainings = [(t["method"], t["options"]["lr"], t["seed"]) for t in values["trainings"]]
    assert len(set(trainings)) == len(trainings) == 2 * (5 + 4)
    assert len(done.stderr.splitlines()) == len(trainings)
    assert values["environment"]["threads"] == values["plan"]["threads"] == 1
    assert values["plan"]["problem"]["problem"] == "digits-convnet"


def test_settings_start_from_the_same_parameters(report):
    values, _, _ = report
    for seed in (0, 1):
        assert len({t["curve"][0][2] for t in values["trainings"] if t["seed"] == seed}) == 1


def test_trainings_end_at_the_target_or_with_their_steps(report):
    values, _, _ = report
    assert {t["reached"] for t in values["trainings"]} == {True, False}
    for training in values["trainings"]:
        *before, (last_step, _, last_accuracy) = training["curve"]
        assert [step for step, _, _ in before] == list(range(0, 5 * len(before), 5))
        assert all(accuracy < 0.6 for _, _, accuracy in before)
        assert training["reached"] == (last_accuracy >= 0.6)
        assert training["reached"] or last_step == 22
        seconds = [time for _, time, _ in training["curve"]]
        assert seconds == sorted(seconds)


def test_the_best_setting_has_the_lowest_median(report):
    values, table, done = report
    assert table in done.stdout
    first, second, _ = (part for part in table.split("\n\n") if part.startswith("| method"))
    for part, measure in ((first, 0), (second, 1)):
        row = next(line for line in part.splitlines() if line.startswith("| sgd |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        lr = cells[-1].split("lr=")[1]
        of_rate = {}
        for training in values["trainings"]:
            if training["method"] == "sgd":
                value = training["curve"][-1][measure] if training["reached"] else float("inf")
                of_rate.setdefault(training["options"]["lr"], []).append(value)
        assert sum(of_rate[lr]) == min(map(sum, of_rate.values()))
        assert cells[1] == f"{sum(of_rate[lr]) / 2:.4g}"
        assert cells[3] == "2 of 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data DIR or set the environment"),
        (("--problem", "digits-autoencoder"), "has no accuracy: choose a classifier"),
        (("--problem", "digits-convnet", "--output", "/proc/nowhere"), "name a folder that can be written"),
        (("--problem", "digits-convnet", "--methods", "adamm"), "did you mean 'adam'"),
        (("--problem", "digits-convnet", "--methods", "kfac:x"), "Unknown curvature approximation 'x'"),
        (("--problem", "digits-convnet", "--methods", "sgd,lr"), "An option needs NAME=VALUE"),
        (("--problem", "digits-convnet", "--methods", "sgd,x=1"), "Unknown option sgd.x"),
        (("--problem", "addition", "--set", "size=1"), "Unknown option problem.size"),
        (("--problem", "digits-convnet", "--methods", "hessian-free,structural_weight=1"), "with recurrent layers"),
        (("--problem", "digits-convnet", "--every-seconds", "0"), "seconds must be a finite number above 0"),
    ],
    ids=[
        "no data",
        "no classifier",
        "unwritable folder",
        "method",
        "curvature",
        "no value",
        "option",
        "set",
        "layers",
        "never",
    ],
)
def test_bad_options_are_refused_before_any_training(arguments, message, tmp_path):
    arguments = arguments if "--output" in arguments else (*arguments, "--output", str(tmp_path))
    done = CliRunner().invoke(main, arguments, env={"CURVLIB_DATA": None})
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "results.json").exists()


def test_a_training_loss_is_a_goal_as_well(tmp_path):
    """Of a problem without an accuracy, and with another curvature of K-FAC."""
    words = ("--problem", "digits-autoencoder", "--methods", "kfac:diagonal", "--batch-sizes", 100, "--seeds", 1)
    done = training(*words, "--training-loss", 40, "--max-steps", 60, "--every", 5, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (only,) = json.loads((tmp_path / "results.json").read_text())["trainings"]
    *before, (_, _, last) = only["curve"]
    assert all(loss > 40 for _, _, loss in before)
    assert only["reached"] == (last <= 40)
    assert only["method"] == "kfac:diagonal"
    assert "a loss of 40 on 5,000 training examples" in done.stdout


def test_seconds_can_end_a_training_and_a_method_can_fix_its_options(tmp_path):
    words = ("--problem", "addition", "--set", "length=6", "--set", "train_sequences=200", "--seeds", 1)
    fixed = "hessian-free,batch_size=20,curvature_fraction=1,structural_weight=0.5"
    methods = (
        "--methods",
        fixed,
        "--methods",
        "sgd,batch_size=10,lr=0.001/0.002",
        "--batch-sizes",
        30,
        "--batch-sizes",
        40,
    )
    limits = ("--max-seconds", 1.5, "--every-seconds", 0.5, "--processor-time", "--target", 1)
    done = training(*words, *methods, *limits, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "results.json").read_text())
    structural, sgd, faster = values["trainings"]  # no batch size is searched
    assert structural["options"] == {"batch_size": "20", "curvature_fraction": "1", "structural_weight": "0.5"}
    assert sgd["options"] == {"batch_size": "10", "lr": "0.001"}
    assert faster["options"] == {"batch_size": "10", "lr": "0.002"}
    assert values["environment"]["clock"] == "process_time"
    assert "length=6" in values["plan"]["problem"]["problem.source"]
    for training_ in values["trainings"]:
        seconds = [time for _, time, _ in training_["curve"]]
        assert seconds[-1] >= 1.5 > seconds[-2]
        assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(seconds[:-1]))
        assert training_["status"] == "finished"
