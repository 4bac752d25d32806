"""The command ``curvlib``: every command, every option, every refusal."""

import re
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from command_line_calls import FAST, ROOT, call, compare, results, without_time

import curvlib
from curvlib.experiments import METHODS, PROBLEMS


def test_problems_and_methods_are_listed():
    listing = call("problems")
    assert listing.exit_code == 0
    assert all(name in listing.output for name in PROBLEMS)
    listing = call("methods")
    assert listing.exit_code == 0
    assert all(name in listing.output for name in METHODS)
    assert "sgd.momentum" in listing.output
    rates = [re.search(r"sgd\.lr +│ +(\S+)", call("methods", "--problem", name).output)[1] for name in PROBLEMS]
    assert len(set(rates)) > 1


def test_all_default_methods_are_compared_and_everything_is_written(tmp_path):
    output = tmp_path / "deep" / "out"
    outcome = compare(output, *FAST)
    assert outcome.exit_code == 0, outcome.output
    default = set(METHODS) - {"newton-trust-region"}
    assert all(re.search(rf"│ {name} +│", outcome.output) for name in default)
    assert re.search(r"┃ +train ┃ +test ┃[^\n]*\n[^\n]*┃ accuracy ┃ accuracy ┃", outcome.output)
    assert f"records: {output / 'results.jsonl'}" in outcome.output
    assert f"figure:  {output / 'comparison.png'}" in outcome.output
    assert {record["method"] for record in results(output)} == default
    assert {record["step"] for record in results(output)} >= {0, 6}
    picture = matplotlib.image.imread(output / "comparison.png")
    assert min(picture.shape[:2]) > 400
    # Lines in several colours, not an empty sheet.
    colours = {tuple(pixel) for pixel in (picture[::3, ::3, :3] * 15).round().astype(int).reshape(-1, 3)}
    assert len(colours) > 20


def test_default_problem_and_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("compare", "--method", "sgd", "--steps", 2).exit_code == 0
    assert results(tmp_path / "results" / "digits-autoencoder")


def test_seconds_and_epochs(tmp_path):
    assert compare(tmp_path / "a", "--method", "sgd", "--seconds", 0.2).exit_code == 0
    assert 0.2 <= results(tmp_path / "a")[-1]["seconds"] < 0.5
    assert compare(tmp_path / "b", "--method", "sgd", "--epochs", 2).exit_code == 0
    assert results(tmp_path / "b")[-1]["epoch"] == 2


def test_options_change_the_training(tmp_path):
    def losses(name, *words):
        outcome = compare(tmp_path / name, "--method", "kfac", "--method", "sgd", *FAST, *words)
        assert outcome.exit_code == 0, outcome.output
        records = results(tmp_path / name)
        return [[r["loss"] for r in records if r["method"] == method] for method in ("kfac", "sgd")]

    kfac, sgd = losses("plain", "--threads", "1")
    # The order of float32 sums depends on where in memory a matrix lies; options change far more.
    assert losses("again") == [pytest.approx(kfac, rel=1e-5), pytest.approx(sgd, rel=1e-5)]
    seeded = losses("seed", "--seed", "4")
    assert seeded[0] != pytest.approx(kfac, rel=1e-4)
    assert seeded[1] != pytest.approx(sgd, rel=1e-4)
    assert losses("rate", "--set", "sgd.lr=0.001")[1] != pytest.approx(sgd, rel=1e-4)
    assert losses("rate2", "--set", "sgd.lr=0.001")[0] == pytest.approx(kfac, rel=1e-5)
    assert losses("damping", "--set", "kfac.damping=50")[0] != pytest.approx(kfac, rel=1e-4)
    assert losses("batch", "--set", "sgd.batch_size=50")[1] != pytest.approx(sgd, rel=1e-4)


@pytest.mark.parametrize("method", ["kfac", "hessian-free"])
def test_every_curvature_of_every_matrix_can_be_swapped_in(tmp_path, method):
    seen = {}
    small = ("--method", method, "--problem", "digits-classifier", "--steps", 2, "--batch-size", 32)
    for matrix in ("ggn", "fisher", "empirical-fisher"):
        for curvature in ("kfac", "diagonal", "exact"):
            words = ("--curvature", curvature, "--matrix", matrix)
            outcome = compare(tmp_path / f"{curvature}-{matrix}", *small, *words)
            assert outcome.exit_code == 0, outcome.output
            assert f"{method} ({curvature} {matrix})" in outcome.output
            seen[curvature, matrix] = results(tmp_path / f"{curvature}-{matrix}")[-1]["loss"]
    outcome = compare(tmp_path / "identity", *small, "--curvature", "identity")
    assert f"{method} (identity)" in outcome.output
    seen["identity"] = results(tmp_path / "identity")[-1]["loss"]
    assert len(set(seen.values())) == len(seen)


def test_block_diagonal_can_be_swapped_in(tmp_path):
    small = ("--method", "kfac", "--problem", "digits-classifier", "--steps", 1, "--batch-size", 32)
    words = ("--curvature", "block-diagonal", "--matrix", "empirical-fisher")
    outcome = compare(tmp_path / "out", *small, *words, "--set", "kfac.statistics_fraction=1")
    assert outcome.exit_code == 0, outcome.output


BAD = {
    "no budget": (("compare",), "exactly one budget, --seconds, --steps or --epochs; got none"),
    "two budgets": (("compare", "--steps", 1, "--seconds", 1), "got --seconds and --steps"),
    "no steps": (("compare", "--steps", 0), "steps must be a finite number above 0"),
    "infinite": (("compare", "--seconds", "inf"), "seconds must be a finite number above 0"),
    "problem": (("compare", "--steps", 1, "--problem", "digit"), "Unknown problem 'digit'"),
    "problems": (("compare", "--steps", 1, "--problem", "x"), "Known: digits-autoencoder, digits-classifier"),
    "problem to list": (("methods", "--problem", "x"), "Unknown problem 'x'"),
    "method": (("compare", "--steps", 1, "--method", "kfca"), "Unknown method 'kfca'; did you mean 'kfac'?"),
    "twice": (("compare", "--steps", 1, "--method", "sgd", "--method", "sgd"), "different methods"),
    "curvature": (
        ("compare", "--steps", 1, "--curvature", "x"),
        "Known: kfac, kfac-reduce, kfac-symmetric-chain, kfac-general-chain, ekfac, kfac-tridiagonal, kfra, diagonal,",
    ),
    "matrix": (("compare", "--steps", 1, "--matrix", "x"), "Known: ggn, fisher, empirical-fisher"),
    "identity": (("compare", "--steps", 1, "--curvature", "identity", "--matrix", "ggn"), "approximates no matrix"),
    "first order": (("compare", "--steps", 1, "--method", "sgd", "--matrix", "ggn"), "none is among sgd"),
    "device": (("compare", "--steps", 1, "--device", "tpu"), "'tpu' is not one of 'cpu', 'cuda', 'auto'"),
    "batch": (("compare", "--steps", 1, "--batch-size", 0), "--batch-size"),
    "threads": (("compare", "--steps", 1, "--threads", 0), "--threads"),
    "seed": (("compare", "--steps", 1, "--seed", -1), "--seed"),
    "set": (
        ("compare", "--steps", 1, "--set", "lr=3"),
        "needs METHOD.OPTION=VALUE, such as sgd.lr=0.05, or problem.",
    ),
    "set problem": (
        ("compare", "--steps", 1, "--set", "problem="),
        "or problem.OPTION=VALUE, such as problem.length=100",
    ),
    "set no option": (
        ("compare", "--steps", 1, "--set", "problem.length=3"),
        "Unknown option problem.length. Known options of digits-autoencoder: none.",
    ),
    "set length": (
        ("compare", "--steps", 1, "--problem", "addition", "--set", "problem.length=1"),
        "problem.length must be an integer at least 2, got 1.",
    ),
    "set words": (
        ("compare", "--steps", 1, "--problem", "addition", "--set", "problem.length=long"),
        "problem.length must be an integer at least 2, got 'long'.",
    ),
    "set units": (
        ("compare", "--steps", 1, "--problem", "addition", "--set", "problem.units=0"),
        "problem.units must be an integer at least 1, got 0.",
    ),
    "set unknown": (
        ("compare", "--steps", 1, "--problem", "addition", "--set", "problem.size=4"),
        "Known options of addition: train_sequences, test_sequences, length, units.",
    ),
    "no text": (("compare", "--steps", 1, "--problem", "character-lm"), "A text file is needed, and none was given"),
    "set nothing": (("compare", "--steps", 1, "--set", "sgd.lr="), "needs METHOD.OPTION=VALUE"),
    "set method": (("compare", "--steps", 1, "--set", "x.lr=3"), "Unknown method 'x'"),
    "set other": (("compare", "--steps", 1, "--method", "sgd", "--set", "adam.lr=3"), "adam is not compared"),
    "set key": (("compare", "--steps", 1, "--set", "sgd.x=3"), "Unknown option sgd.x. Known options of sgd: batch"),
    "set text": (("compare", "--steps", 1, "--set", "sgd.lr=x"), "sgd.lr must be a finite number above 0, got 'x'"),
    "set value": (("compare", "--steps", 1, "--set", "sgd.lr=-1"), "sgd.lr must be a finite number above 0, got -1.0"),
    "both": (("compare", "--steps", 1, "--resume", "--overwrite"), "exclude each other"),
    "nothing": (("compare", "--steps", 1, "--resume"), "nothing to resume"),
    "no data": (("compare", "--steps", 1, "--problem", "mnist-classifier"), "--data DIR or set the environment"),
    "bad data": (("compare", "--steps", 1, "--problem", "mnist-classifier", "--data", "x"), "folder x does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CURVLIB_DATA", raising=False)
    words, message = BAD[case]
    outcome = call(*words)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output
    assert message in re.sub(r"\s+", " ", outcome.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    outcome = compare(tmp_path / "out", "--steps", 1, "--device", "cuda")
    assert outcome.exit_code == 2
    assert "use --device cpu" in outcome.output


def test_data_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CURVLIB_DATA", str(tmp_path / "absent"))
    outcome = compare(tmp_path / "out", "--steps", 1, "--problem", "mnist-autoencoder")
    assert outcome.exit_code == 2
    assert "absent does not exist" in outcome.output


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("curvlib.experiments.command_line.compare", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / "file").write_text("mine")
    outcome = compare(tmp_path / "file", "--steps", 1)
    assert outcome.exit_code == 2
    assert "file is no folder" in outcome.output
    for extra in ("--overwrite", "--resume"):
        outcome = compare(tmp_path / "file", "--steps", 1, extra)
        assert outcome.exit_code == 2
        assert "file is no folder" in outcome.output
        assert "--overwrite" not in outcome.output.split("Error:")[1]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_reported_without_a_traceback(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("curvlib.experiments.command_line.compare", full)
    outcome = compare(tmp_path / "out", "--steps", 1)
    assert outcome.exit_code == 1
    assert "No space left" in outcome.output


def test_a_layer_that_a_curvature_does_not_take_is_reported_without_a_traceback(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise curvlib.UnsupportedLayerError("KFAC has no layer rule")

    monkeypatch.setattr("curvlib.experiments.command_line.compare", refuse)
    outcome = compare(tmp_path / "out", "--steps", 1)
    assert outcome.exit_code == 1
    assert "KFAC has no layer rule" in outcome.output
    assert "--curvature exact" in " ".join(outcome.output.split())


def test_earlier_results_are_kept_unless_overwritten(tmp_path):
    words = ("--method", "sgd", *FAST)
    assert compare(tmp_path, *words).exit_code == 0
    before = results(tmp_path)
    outcome = compare(tmp_path, *words)
    assert outcome.exit_code == 2
    assert "--resume" in outcome.output
    assert "--overwrite" in outcome.output
    assert results(tmp_path) == before
    assert compare(tmp_path, *words, "--seed", 1, "--overwrite").exit_code == 0
    assert without_time(results(tmp_path)) != without_time(before)


def test_foreign_files_survive_overwriting(tmp_path):
    for name in ("settings.json", "checkpoints/best.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    outcome = compare(tmp_path, "--method", "sgd", *FAST, "--overwrite")
    assert outcome.exit_code == 2
    assert "settings.json was not written by a comparison" in outcome.output
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["best.pt", "settings.json"]


def test_data_that_a_problem_does_not_read_are_warned_of(tmp_path, monkeypatch):
    words = ("--problem", "digits-classifier", "--method", "sgd", "--steps", 1)
    outcome = compare(tmp_path / "a", *words, "--data", tmp_path)
    assert outcome.exit_code == 0
    assert f"Warning: --data {tmp_path} is not used: digits-classifier needs no data files." in outcome.stderr
    monkeypatch.setenv("CURVLIB_DATA", str(tmp_path))
    assert not compare(tmp_path / "b", *words).stderr


def test_version():
    outcome = call("--version")
    assert outcome.exit_code == 0
    assert outcome.output == f"curvlib, version {curvlib.__version__}\n"


def test_threads_are_left_to_pytorch_unless_given(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert compare(tmp_path / "a", "--method", "sgd", *FAST).exit_code == 0
    assert set(chosen) == {torch.get_num_threads()}
    assert compare(tmp_path / "b", "--method", "sgd", *FAST, "--threads", 3).exit_code == 0
    assert 3 in chosen


def test_missing_extras_are_named():
    code = "import sys; sys.modules['rich'] = None; import curvlib.experiments"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert 'pip install "curvlib[experiments]"' in outcome.stderr.splitlines()[-1]
