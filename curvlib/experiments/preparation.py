"""The output folder before a comparison: a new one, one that is replaced, one that is gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curvlib.experiments.budgets import Budget, budget_from_text
from curvlib.experiments.comparison import Comparison
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.results_folder import ResultsFolder


def prepare_folder(comparison: Comparison, folder: ResultsFolder) -> None:
    """Make an output folder ready for a new comparison.

    Args:
        comparison: whose settings are kept there.
        folder: must hold none of the files that will be written.

    Raises:
        ExperimentError: it holds results or other files of these names, or cannot be written.
    """
    folder.check_kinds()
    earlier = _earlier_files(folder)
    if earlier:
        raise ExperimentError(
            f"{folder.path} holds the results of an earlier comparison: go on with it by --resume, "
            "replace it by --overwrite, or choose another folder with --output."
        )
    _refuse_foreign_files(folder.files_of(_names(comparison)))
    folder.make_writable()
    folder.write_settings(comparison.settings())


def replace_folder(comparison: Comparison, folder: ResultsFolder) -> None:
    """Make an output folder ready for a new comparison, and delete what an earlier one wrote there.

    Args:
        comparison: whose settings are kept there.
        folder: may hold the files of an earlier comparison; all others stay.

    Raises:
        ExperimentError: a file of another origin stands where one will be written, or the folder cannot be written.
            Nothing has been deleted then.
    """
    folder.check_kinds()
    earlier = _earlier_files(folder)
    _refuse_foreign_files([file for file in folder.files_of(_names(comparison)) if file not in earlier])
    folder.make_writable()
    # The settings, which tell what belongs to the comparison, go last.
    folder.delete(sorted(earlier, key=lambda file: file == folder.settings))
    folder.write_settings(comparison.settings())


def reopen_folder(comparison: Comparison, folder: ResultsFolder) -> None:
    """Check that a comparison can go on in its folder.

    Args:
        comparison: must have the settings of the earlier one; only its budget may be larger, of the same kind.
        folder: where that one was started.

    Raises:
        ExperimentError: nothing was started there, a setting differs (it is named), or the folder cannot be written.
    """
    folder.check_kinds()
    if not folder.has_results:
        raise ExperimentError(f"There is nothing to resume in {folder.path}: leave out --resume.")
    before, now = folder.read_settings(), comparison.settings()
    extended = _is_larger(comparison.budget, before["budget"])
    different = [
        f"{name} was {before.get(name, 'not set')}, is now {now.get(name, 'not set')}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name) and not (name == "budget" and extended)
    ]
    if different:
        raise ExperimentError(
            f"{folder.path} was started with other settings: {'; '.join(different)}. Resume with the same ones (the "
            "budget may be larger), start anew with --overwrite, or choose another folder with --output."
        )
    folder.records()
    folder.make_writable()
    if extended:
        folder.write_settings(now)


def _names(comparison: Comparison) -> list[str]:
    return [method.name for method in comparison.methods]


def _earlier_files(folder: ResultsFolder) -> list[Path]:
    """Return the files of the comparison that was started in a folder, none if there was none.

    Raises:
        ExperimentError: there are results whose settings are missing, or settings of another origin.
    """
    if not folder.settings.exists():
        return []
    methods = [name.strip() for name in folder.read_settings()["method"].split(",")]
    return folder.files_of(methods)


def _refuse_foreign_files(files: Sequence[Path]) -> None:
    if files:
        raise ExperimentError(
            f"{', '.join(str(file) for file in files)} would be replaced and belongs to no earlier comparison: "
            "move it away, or choose another folder with --output."
        )


def _is_larger(budget: Budget, before: str) -> bool:
    """Whether a budget is of the kind of an earlier one, which is given as text, and larger."""
    earlier = budget_from_text(before)
    return earlier is not None and type(earlier) is type(budget) and budget.count > earlier.count
