"""The benchmark beside SciPy runs, and all count their work in one unit; times are never compared."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.newton_peers import RUNS, EnoughError, Meter, main, subjects


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newton-peers")
    words = ["--budget", "12", "--threads", "1", "--only", "curvlib: hessian_free", "--only", "SciPy: Newton-CG"]
    done = CliRunner().invoke(main, [*words, "--output", str(folder)])
    assert done.exit_code == 0, done.output
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


def test_all_lower_the_loss_within_the_budget(report):
    values, text = report
    assert list(values) == ["classifier", "auto-encoder"]
    for name, result in values.items():
        assert len(result["runs"]) == 5
        for method, ((points, end),) in result["runs"].items():
            assert end == "budget", (name, method)
            assert points[-1]["gradients"] >= 12 > (points[-2]["gradients"] if len(points) > 1 else 0)
            assert all(point["seconds"] > 0 for point in points)
            assert f"| {method} |" in text
        assert min(points[-1]["loss"] for ((points, _),) in result["runs"].values()) < 5


def test_means_are_over_the_seeds_that_start_from_other_weights(tmp_path):
    words = ["--budget", "60", "--threads", "1", "--only", "SciPy: Newton-CG, GGN", "--seed", "3", "--seed", "4"]
    done = CliRunner().invoke(main, [*words, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "results.json").read_text())["classifier"]
    (method, runs), text = *result["runs"].items(), (tmp_path / "results.md").read_text()
    assert result["seeds"] == [3, 4]
    assert runs[0][0][0]["loss"] != runs[1][0][0]["loss"]
    reached = [next(point["gradients"] for point in points if point["loss"] <= 0.3) for points, _ in runs]
    # both come to 0.3 and neither to 0.001
    assert f"| {method} | {(reached[0] * reached[1]) ** 0.5:.0f} | " in text
    assert " | - | - | " in text
    assert "geometric means of the seeds 3, 4" in text


def test_losses_are_those_of_hessianfree():
    """Half the squared error of an image, and the cross-entropy, both means over images: by hand."""
    for _, subject, _ in subjects():
        objective = subject.objective()
        with torch.no_grad():
            z = objective.model(subject.inputs)
        by_hand = -(z.log_softmax(1) * subject.targets).sum(1) if subject.classifier else None
        if by_hand is None:
            by_hand = 0.5 * (z - subject.targets).square().sum(1)
        value = subject.scale * float(objective.value(subject.batch))
        assert value == pytest.approx(float(by_hand.mean()), rel=1e-12)


def test_work_of_scipy_is_that_of_the_passes():
    subject = next(subjects())[1]
    meter = Meter(budget=6.0, clock=lambda: 0.0)
    with pytest.raises(EnoughError):
        RUNS["SciPy: Newton-CG, GGN products"](subject, meter)
    # multiples of a forward pass, and at least a gradient and two products before the first point
    assert np.allclose(3 * meter.gradients, round(3 * meter.gradients))
    assert meter.points[0].gradients >= 1 + 2 * 4 / 3


def test_an_unknown_method_is_refused():
    done = CliRunner().invoke(main, ["--only", "nothing", "--threads", "1"])
    assert done.exit_code == 2
    assert "begins so" in done.output
