"""The command ``curvlib inspect``: files, report, models of the user's own, refusals."""

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line_calls import call
from PIL import Image

import curvlib
from curvlib.experiments import PROBLEMS, ExperimentError, Inspection, Training, configure, inspect_evaluation
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS
from curvlib.experiments.images import MNIST, Images, SmallMNIST
from curvlib.experiments.inspection_dense import DenseWork
from curvlib.experiments.inspection_figures import heat_maps
from curvlib.experiments.inspection_folder import InspectionFolder
from curvlib.experiments.inspection_selection import Region, Selection
from curvlib.experiments.inspection_subject import trained
from curvlib.experiments.terminal import console_of_command

SMALL = ("--layers", "4,10", "--examples", 60, "--steps", 3, "--batch-size", 50)
TINY = (Path(__file__).parent / "inspected_models.py").read_text()


def inspect(output, *words):
    return call("inspect", "--output", output, *words)


def own(folder, monkeypatch, name, source=TINY):
    (folder / f"{name}.py").write_text(source)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(folder)


def numbers(output):
    return json.loads((output / "inspection.json").read_text())


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_everything_is_written_and_the_page_needs_no_other_file(tmp_path):
    output = tmp_path / "out"
    outcome = inspect(output, *SMALL, "--approximation", "kfac,kfac-reduce", "--inverse")
    assert outcome.exit_code == 0, outcome.output
    names = {"matrix-kfac.png", "inverse-kfac.png", "spectra.png", "density.png"}
    assert {path.name for path in output.iterdir()} == {*names, "report.html", "inspection.json"}
    told = numbers(output)
    assert set(told["files"]) == {*names, "report.html"}
    for name in names:
        picture = pixels((output / name).read_bytes())
        assert min(picture.shape[:2]) > 250
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    # both halves of the density hold thick black lines and coloured ones
    left, right = np.array_split(pixels((output / "density.png").read_bytes())[60:380, 80:], 2, axis=1)
    for half in (left, right):
        assert (half.max(axis=2) < 30).sum() > 300
        assert (np.ptp(half, axis=2) > 100).sum() > 150
    page = (output / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    sources = re.findall(r"src='([^']*)'", page)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for row in told["approximations"]:
        for shown in (f"{row['error']:.4f}", f"{row['step_cosine']:.4f}"):
            assert f"<td>{shown}</td>" in page
            assert shown in outcome.output
        assert all(f"<td>{error:.4f}</td>" in page for error in row["layer_errors"])
    assert "curvlib inspect --steps 3 --batch-size 50" in page
    assert curvlib.__version__ in page
    assert torch.__version__ in page
    for text in (page, json.dumps(told)):
        assert str(tmp_path) not in text
        assert str(Path.cwd()) not in text
    assert told["how"]["seed"] == "0"
    assert "3 steps of kfac, 50 examples a step" in outcome.output


def test_numbers_are_those_of_the_python_interface(tmp_path):
    output = tmp_path / "out"
    assert inspect(output, *SMALL, "--approximation", "kfac", "--no-density").exit_code == 0
    problem = PROBLEMS.get("digits-small-classifier")
    method = configure("kfac", problem, {"batch_size": "50"})
    training = Training(problem=problem, method=method, steps=3, examples=60, device=torch.device("cpu"))
    subject = trained(training, problem.load(), lambda *_: None, lambda _: None)
    seen = inspect_evaluation(
        subject.evaluation, Inspection(layers=("4", "10"), approximations=("kfac",)), lambda *_: None
    )
    row = numbers(output)["approximations"][0]
    assert row["error"] == pytest.approx(seen.rows[0].error, rel=1e-5)
    assert not (output / "density.png").exists()


def test_a_problem_is_trained_for_the_steps_that_were_asked():
    problem = PROBLEMS.get("digits-small-classifier")
    loaded = problem.load()
    parameters = {}
    for steps in (0, 1, 4):
        method = configure("sgd", problem, {"batch_size": "2000"})
        training = Training(problem=problem, method=method, steps=steps, examples=2000, device=torch.device("cpu"))
        checked = []
        subject = trained(training, loaded, lambda *_: None, checked.append)
        assert len(checked) == 1
        assert subject.evaluation.examples == 1500
        parameters[steps] = subject.evaluation.objective.parameter_vector()
    torch.manual_seed(0)
    model = problem.network.build()
    objective = curvlib.Objective(model, loaded.loss, l2=problem.l2)
    torch.testing.assert_close(parameters[0], objective.parameter_vector())
    # the first step of Nesterov's momentum is (1 + momentum) lr times the gradient
    gradient = objective.at(loaded.train.batch).gradient()
    torch.testing.assert_close(parameters[1], parameters[0] - 1.9 * 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(parameters[4], parameters[1])


def test_options_of_the_problem_and_of_the_method_by_its_name(tmp_path):
    words = (
        "--problem",
        "rowwise-digits-rnn",
        "--steps",
        0,
        "--examples",
        9,
        "--no-density",
        "--approximation",
        "kfac",
    )
    outcome = inspect(tmp_path / "a", *words, "--set", "problem.units=3", "--set", "kfac.damping=0.5")
    assert outcome.exit_code == 0, outcome.output
    assert numbers(tmp_path / "a")["parameters"] == 3 * 8 + 3 * 3 + 2 * 3 + 3 * 10 + 10
    assert "--set problem.units=3 --set kfac.damping=0.5" in numbers(tmp_path / "a")["how"]["command"]
    outcome = inspect(tmp_path / "b", *words, "--set", "problem.width=3")
    assert outcome.exit_code == 2
    assert "problem.width" in outcome.output


def test_a_training_that_diverges_is_an_error():
    problem = PROBLEMS.get("digits-small-classifier")
    training = Training(
        problem=problem, method=configure("sgd", problem, {"lr": "1e30"}), steps=30, examples=10,
        device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(ExperimentError, match=r"sgd diverged after \d+ of 30 steps"):
        trained(training, problem.load(), lambda *_: None, lambda _: None)


def test_earlier_inspections_and_foreign_files_are_kept(tmp_path):
    words = (*SMALL, "--approximation", "kfac", "--no-density")
    (tmp_path / "notes.txt").write_text("mine")
    assert inspect(tmp_path, *words).exit_code == 0
    outcome = inspect(tmp_path, *words)
    assert outcome.exit_code == 2
    assert "--overwrite" in outcome.output
    assert inspect(tmp_path, *SMALL, "--approximation", "diagonal", "--no-density", "--overwrite").exit_code == 0
    names = {"notes.txt", "matrix-diagonal.png", "spectra.png", "report.html", "inspection.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    (tmp_path / "inspection.json").unlink()
    outcome = inspect(tmp_path, *words)
    assert outcome.exit_code == 2
    assert "belongs to no earlier" in " ".join(outcome.output.split())
    (tmp_path / "inspection.json").write_text('{"files": ["../notes.txt"]}')
    outcome = inspect(tmp_path, *words, "--overwrite")
    assert outcome.exit_code == 2
    assert "was not written by an inspection" in " ".join(outcome.output.split())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, "own_models_a")
    outcome = inspect(
        tmp_path / "out",
        "--model",
        "own_models_a:tiny",
        "--damping",
        0.1,
        "--matrix",
        "empirical-fisher",
        "--approximation",
        "kfac",
        "--approximation",
        "low-rank-blocks",
    )
    assert outcome.exit_code == 0, outcome.output
    told = numbers(tmp_path / "out")
    assert told["parameters"] == 43
    assert told["matrix"] == "empirical-fisher"
    assert "Sequential with 43 parameters" in told["how"]["model"]
    assert told["how"]["curvature"] == "EmpiricalFisher() on 9 examples"
    words = ("inspect", "--model", "own_models_a:unsupported", "--approximation", "kfac")
    outcome = call(*words)
    assert outcome.exit_code == 2
    assert "kfac: KFAC has no layer rule for 1 parameter(s): 1.factor" in outcome.output
    assert "or give --on-unsupported diagonal, dense or exclude" in re.sub(r"\s+", " ", outcome.output)
    assert not (tmp_path / "results").exists()
    outcome = call(*words, "--approximation", "identity")
    assert outcome.exit_code == 0, outcome.output
    assert "kfac left out, because of parameters outside every layer (1.factor: " in outcome.output
    outcome = call(*words, "--on-unsupported", "dense", "--overwrite")
    assert outcome.exit_code == 0, outcome.output
    assert "kfac: outside every layer, 1.factor: exact dense block" in outcome.output
    outcome = call(*words, "--approximation", "identity", "--overwrite")
    assert (tmp_path / "results" / "inspect-own_models_a-unsupported" / "report.html").is_file()
    page = (tmp_path / "results" / "inspect-own_models_a-unsupported" / "report.html").read_text()
    assert "What does not apply" in page


BROKEN = """
import torch
from torch import nn
inputs, loss = torch.ones(3, 2), nn.MSELoss()
number = 3
def two(): return nn.Linear(2, 2), loss
def text(): return "no"
def no_module(): return inputs, loss, (inputs, inputs)
def wrong_shape(): return nn.Linear(4, 2), loss, (inputs, inputs)
def no_batch(): return nn.Linear(2, 2), loss, inputs
def raises(): raise KeyError("weights.pt")
"""
MODELS = {
    "no colon": ("broken", "--model needs MODULE:FUNCTION, such as my_models:trained, got 'broken'."),
    "no module": ("nowhere_at_all:f", "there is no module 'nowhere_at_all' in the current folder or on Python's path"),
    "no function": ("broken:f", "nothing of that name; functions: no_batch, no_module, raises, text, two, wrong"),
    "a number": ("broken:number", "number must be a function of broken, which has a int of that name"),
    "two": ("broken:two", "must return (model, loss, (inputs, targets)), got a tuple of length 2."),
    "text": ("broken:text", "must return (model, loss, (inputs, targets)), got a str."),
    "no network": ("broken:no_module", "with a torch.nn.Module first, got a Tensor."),
    "shape": ("broken:wrong_shape", "model, loss and batch do not go together"),
    "batch": ("broken:no_batch", "a batch must be a pair (inputs, targets)"),
    "raises": ("broken:raises", "the function raised KeyError: 'weights.pt'"),
    "import": ("broken_import:f", "importing broken_import failed: No module named 'not_installed'"),
    "syntax": ("broken_syntax:f", "importing broken_syntax raised SyntaxError"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used_is_refused_without_a_traceback(tmp_path, monkeypatch, case):
    own(tmp_path, monkeypatch, "broken", BROKEN)
    own(tmp_path, monkeypatch, "broken_import", "import not_installed\n")
    own(tmp_path, monkeypatch, "broken_syntax", "def f(:\n")
    path, message = MODELS[case]
    outcome = inspect(tmp_path / "out", "--model", path)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output
    assert message in re.sub(r"\s+", " ", outcome.output)


BAD = {
    "layers": (("--layers", "3"), "--layers 3 fits no layer"),
    "most": (("--most", 100, "--steps", 10_000_000), "more than --most 100"),
    "matrix": (("--matrix", "x"), "Known: ggn, fisher, empirical-fisher, hessian"),
    "approximation": (("--approximation", "x"), "Unknown curvature approximation 'x'"),
    "damping": (("--damping", 0), "damping must be a finite number above 0"),
    "method": (("--method", "kfca"), "did you mean 'kfac'"),
    "problem": (("--problem", "x"), "Unknown problem 'x'"),
    "unsupported": (("--on-unsupported", "drop"), "'drop' is not one of 'raise', 'diagonal', 'dense', 'exclude'"),
    "none applies": (("--matrix", "hessian", "--approximation", "kfac", "--steps", 10_000_000), "kfac: KFAC needs vec"),
    "steps": (("--steps", -1), "--steps"),
    "set": (("--set", "lr"), "--set needs OPTION=VALUE, such as lr=0.05"),
    "set unknown": (("--set", "lr=1"), "Unknown option kfac.lr"),
    "data": (("--problem", "mnist-small-classifier"), "--data DIR"),
    "model and examples": (("--model", "a:b", "--examples", 3), "returns the batch whose examples the curvature is of"),
    "model and problem": (("--model", "a:b", "--steps", 3, "--method", "sgd"), "--method, --steps is for the built-in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_work(tmp_path, monkeypatch, case):
    monkeypatch.delenv("CURVLIB_DATA", raising=False)
    words, message = BAD[case]
    outcome = inspect(tmp_path / "out", *words)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output
    assert message in re.sub(r"\s+", " ", outcome.output)
    assert not (tmp_path / "out").exists()


def test_the_approximations_are_listed_with_the_matrices_of_each():
    lines = {}
    for line in call("inspect", "--list").output.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 6 and cells[0]:
            lines[cells[0]] = cells[1:]
    assert lines["unit-blocks"][0] == "BlockDiagonal(partition=ByOutputUnit())"
    assert lines["low-rank-alone"][1:] == ["yes"] * 4
    assert lines["kfac"][1:] == ["yes", "yes", "yes", "-"]
    assert set(INSPECTED_APPROXIMATIONS) <= set(lines)


def test_an_interruption_writes_what_is_done(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, "own_models_c")
    compare = DenseWork.compare

    def interrupted_afterwards(self, name, operator):
        row = compare(self, name, operator)
        os.kill(os.getpid(), signal.SIGINT)
        return row

    words = ("--model", "own_models_c:tiny", "--approximation", "kfac", "--approximation", "ekfac")
    with monkeypatch.context() as patch:
        patch.setattr(DenseWork, "compare", interrupted_afterwards)
        outcome = inspect(tmp_path / "out", *words)
        # the signal came within the first approximation, which counts once its end has been reported
        assert outcome.exit_code == 130, outcome.output
        assert "nothing was written" in outcome.output
        assert not (tmp_path / "out").exists()
    row = DenseWork._row

    def interrupted_later(self, choice):
        if choice.name == "ekfac":
            os.kill(os.getpid(), signal.SIGINT)
        return row(self, choice)

    monkeypatch.setattr(DenseWork, "_row", interrupted_later)
    outcome = inspect(tmp_path / "out", *words)
    assert outcome.exit_code == 130, outcome.output
    told = numbers(tmp_path / "out")
    assert told["interrupted"] == ["ekfac"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*told["files"], "inspection.json"}
    assert "Interrupted: ekfac not looked at." in (tmp_path / "out" / "report.html").read_text()


def test_a_write_that_fails_leaves_the_earlier_inspection(tmp_path, monkeypatch):
    earlier = {"a.png": b"a", "inspection.json": b'{"files": ["a.png"]}'}
    InspectionFolder(tmp_path / "out", overwrite=False).write(earlier)
    write, written = Path.write_bytes, []

    def full(self, content):
        written.append(self.name)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        InspectionFolder(tmp_path / "out", overwrite=True).write({"b.png": b"b", "inspection.json": b"{}"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == earlier


def test_a_large_model_is_told_the_remedies_and_estimated(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, "own_models_d")
    words = ("--model", "own_models_d:tiny", "--most", 42, "--approximation", "kfac")
    outcome = inspect(tmp_path / "out", *words)
    assert outcome.exit_code == 2
    assert "Choose fewer with --layers 0,2, raise --most, or use --estimate" in re.sub(r"\s+", " ", outcome.output)
    outcome = inspect(tmp_path / "out", *words, "--estimate")
    assert outcome.exit_code == 0, outcome.output
    assert "ggn on 43 of 43 parameters, and 1 approximations: up to " in outcome.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"density.png", "report.html", "inspection.json"}


def test_the_path_of_the_data_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CURVLIB_DATA", str(tmp_path / "secret"))
    outcome = inspect(tmp_path / "out", *SMALL, "--approximation", "kfac", "--no-density")
    assert outcome.exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "--data DATA" in page
    assert "secret" not in page
    assert not outcome.stderr
    outcome = inspect(tmp_path / "b", *SMALL, "--layers", "x", "--data", tmp_path)
    assert f"Warning: --data {tmp_path} is not used" in outcome.stderr


def test_heat_maps_are_black_and_white_with_the_borders_dashed():
    layers = tuple(Region(name=name, coordinates=torch.arange(8)) for name in "ab")
    selection = Selection(regions=layers, total=16)
    exact, nothing = torch.zeros(16, 16), torch.zeros(16, 16)
    exact[:8, :8] = 2.0
    exact[8:, 8:] = 1.0
    picture = pixels(heat_maps((("exact", exact), ("none", nothing)), selection))
    # 26 pixels an entry; the panels begin at 62 and 62 + 416 + 14, both 34 from the top
    assert picture[34 + 13, 62 + 13].tolist() == [255, 255, 255]
    assert picture[34 + 416 - 13, 62 + 13].tolist() == [0, 0, 0]
    assert picture[34 + 416 - 40, 62 + 416 - 40].tolist() == pytest.approx([128] * 3, abs=6)
    assert picture[34 + 13, 62 + 416 + 14 + 13].tolist() == [0, 0, 0]
    border = picture[34:450, 62 + 206 : 62 + 210]
    dashes = (border[..., 0] - border[..., 2]).max(axis=1) > 100
    assert 0.3 < dashes.mean() < 0.8
    elsewhere = picture[34:450, 62 + 100 : 62 + 104]
    assert ((elsewhere[..., 0] - elsewhere[..., 2]).max(axis=1) > 100).mean() < 0.02


def test_small_mnist_averages_squares_of_four_pixels(monkeypatch):
    image = torch.rand(3, 28, 28)
    monkeypatch.setattr(
        MNIST, "load", lambda self, path: (Images(pixels=image.flatten(1)), Images(pixels=image[:1].flatten(1)))
    )
    train, test = SmallMNIST().load(None)
    assert train.pixels.shape == (3, 256)
    assert test.pixels.shape == (1, 256)
    small = train.pixels.view(3, 16, 16)
    assert float(small[:, 0].abs().max()) == 0
    torch.testing.assert_close(small[:, 1:15, 1:15], image.view(3, 14, 2, 14, 2).mean(dim=(2, 4)))


def test_names_of_models_are_no_emoji(capsys):
    console_of_command().print("my_models:one: a loss", ":one:")
    assert "my_models:one: a loss :one:" in capsys.readouterr().out


def test_a_linear_model_is_one_layer(tmp_path, monkeypatch):
    source = (
        "import torch\nfrom torch import nn\nbatch = torch.ones(3, 2), torch.ones(3, 1)\n"
        "def f(): return nn.Linear(2, 1), nn.MSELoss(), batch\n"
    )
    own(tmp_path, monkeypatch, "own_models_b", source)
    outcome = inspect(tmp_path / "out", "--model", "own_models_b:f", "--approximation", "kfac", "--layers", "(model)")
    assert outcome.exit_code == 0, outcome.output
    assert numbers(tmp_path / "out")["layers"] == [{"name": "(model)", "size": 3}]
