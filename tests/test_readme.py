"""The README: its Python code runs, its commands exist, its tables name what there is."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import curvlib
from curvlib import matrices
from curvlib.experiments import METHODS, PROBLEMS
from curvlib.experiments.command_line import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def fenced(path, language):
    """Yield (number of the first line, text) of the blocks of one language."""
    text = path.read_text()
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: block.start(1)].count("\n"), block[1]


def run_python(path):
    """Run all Python blocks of a file in one namespace, as a reader would, and return it."""
    namespace = {"__name__": path.stem}
    for line, code in fenced(path, "python"):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)
    return namespace


def commands(path):
    """Words of every shell command, without variables in front and comments behind."""
    for _, code in fenced(path, "bash"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def check_command(words):
    """Fail unless the command exists and takes these arguments; nothing is run."""
    program, *arguments = words
    name = Path(program).name
    if name == "make":
        done = subprocess.run([program, "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif name == "curvlib":
        command = main.commands[arguments[0]]
        command.make_context(arguments[0], list(arguments[1:]))
    elif name == "python" and arguments[0] == "-m":
        assert arguments[1] in {"pytest", "benchmarks"}
        for argument in arguments[2:]:
            assert not argument.endswith(".py") or (ROOT / argument).is_file(), argument
    else:
        assert name in {"ruff", "mypy"}, f"unknown command {name}"
        assert (Path(sys.executable).parent / name).exists()


def test_the_code_runs(capsys):
    namespace = run_python(README)
    printed = capsys.readouterr().out
    assert float(namespace["change"]) < 0, "the first step lowers the loss"
    assert "the loss changes by -" in printed
    assert namespace["solution"].solved
    assert str(namespace["solution"]) in printed
    assert namespace["curvature_along_step"].shape == ()
    assert namespace["C"].shape == (421, 421)
    assert namespace["result"].accepted
    gradient = namespace["gradient"]
    assert all(float(step @ gradient) < 0 for step in namespace["steps"])
    lengths = [float(step.norm()) for step in namespace["steps"]]
    assert lengths == sorted(lengths, reverse=True), "more damping, shorter steps"


def test_the_code_imports_nothing_that_it_does_not_use():
    code = "\n".join(code for _, code in fenced(README, "python"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert imported <= used


@pytest.mark.parametrize("words", list(commands(README)), ids=" ".join)
def test_commands_exist(words):
    check_command(words)


# The README's budgets in small: a hundredth of each.
BUDGETS = {"--seconds": lambda text: str(float(text) / 100), "--epochs": lambda text: str(float(text) / 100),
           "--steps": lambda text: str(int(text) // 100)}  # fmt: skip


def test_the_command_line_can_be_followed_from_its_first_command_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    followed = 0
    for words in commands(README):
        if Path(words[0]).name != "curvlib" or "--data" in words or "cuda" in words:
            continue
        options = zip(["", *words], words, strict=False)
        arguments = [BUDGETS[option](word) if option in BUDGETS else word for option, word in options][1:]
        outcome = CliRunner().invoke(main, arguments)
        assert outcome.exit_code == 0, f"{' '.join(words)}: {outcome.output}"
        assert "Warning" not in outcome.output
        followed += 1
    assert followed >= 7
    assert {path.parent.name for path in tmp_path.glob("results/*/results.jsonl")} == {
        "addition", "digits-autoencoder", "digits-classifier", "tuned", "diagonal"
    }  # fmt: skip


def test_checking_a_command_can_fail():
    with pytest.raises(Exception, match="No such option"):
        check_command(["curvlib", "compare", "--no-such-option"])
    with pytest.raises(AssertionError, match="no-such-target"):
        check_command(["make", "no-such-target"])
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


def strategies(module, base):
    """Names of the concrete classes of a kind that a module exports."""
    classes = {name: getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}
    return {name for name, cls in classes.items() if issubclass(cls, base) and not inspect.isabstract(cls)}


def test_tables_are_complete():
    text = README.read_text()
    members = strategies(curvlib.approximations, curvlib.approximations.Approximation)
    members |= strategies(curvlib.approximations, curvlib.approximations.WeightSharing)
    members |= strategies(curvlib.operators, curvlib.operators.LinearOperator)
    members |= strategies(curvlib.solvers, curvlib.solvers.DampingControl)
    members |= strategies(curvlib.optimizers, curvlib.optimizers.StepRule)
    for kind in ("TraceEstimator", "DiagonalEstimator", "ProbeDistribution", "SpectrumEnd"):
        members |= strategies(curvlib.spectra, getattr(curvlib.spectra, kind))
    members |= {"Lanczos", "SpectralDensity", "Estimate"}
    members |= {
        name
        for name, cls in inspect.getmembers(matrices, inspect.isclass)
        if issubclass(cls, matrices.CurvatureMatrix) and not inspect.isabstract(cls)
    }
    known = curvlib.output_losses.output_loss.registry  # other tests may have added losses of their own
    members |= {loss.__name__ for loss in known if loss.__module__ == torch.nn.MSELoss.__module__}
    members |= {*PROBLEMS, *METHODS}
    assert len(members) > 30
    missing = {name for name in members if f"`{name}`" not in text and f"`{name}(" not in text}
    assert not missing


def test_links_lead_somewhere():
    for path in (README, ROOT / "CONTRIBUTING.md"):
        local = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not link.startswith("http")]
        assert all((ROOT / link).exists() for link in local), local


def test_the_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert len(pictures) >= 3
    for picture in pictures:
        assert picture.stat().st_size < 200_000
        assert picture.read_bytes().startswith(b"\x89PNG")
