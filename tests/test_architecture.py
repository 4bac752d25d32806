"""Who may import whom, as DESIGN lays it out, and no import inside a function."""

import ast
from pathlib import Path

import pytest

import curvlib

PACKAGE = Path(curvlib.__file__).parent
# part of the package -> parts that it may import
ALLOWED = {
    "operators": set(),
    "output_losses": set(),
    "parameters": set(),
    "extensions": {"parameters"},
    "objective": {"extensions", "operators", "output_losses", "parameters"},
    "matrices": {"objective"},
    "approximations": {"extensions", "matrices", "objective", "operators", "output_losses"},
    "solvers": {"operators"},
    "spectra": {"operators", "solvers"},
    "optimizers": {"approximations", "matrices", "objective", "operators", "output_losses", "solvers", "spectra"},
    "experiments": {"", "approximations", "operators", "optimizers", "output_losses", "solvers", "spectra"},
    "testing": {"", "approximations", "extensions", "objective", "operators", "output_losses", "solvers"},
}
# These two use what a user may use: names of the package itself as well.
PUBLIC_ALONE = {"experiments", "testing"}
USES_BACKPACK = {"extensions", "approximations"}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if part_of(path) != "__init__"]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "curvlib":
                yield from (f"curvlib.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    tree, own = ast.parse(path.read_text()), part_of(path)
    assert own in ALLOWED, f"{own} is a new part: say what it may import"
    for name in imports(tree):
        top, *rest = name.split(".")
        assert top != "torchvision"
        assert top != "backpack" or own in USES_BACKPACK
        if top == "curvlib":
            other = rest[0] if rest else ""
            public = other not in ALLOWED  # a name of the package itself, such as curvlib.GGN
            if own == "testing" and other != own:
                assert len(rest) <= 1, f"{own} imports {name}, which is no public module"
            assert other == own or (own in PUBLIC_ALONE and public) or other in ALLOWED[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_inside_a_function(path):
    tree = ast.parse(path.read_text())
    inside = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not inside


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_have_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400, "a file of over 400 lines is usually two ideas"
