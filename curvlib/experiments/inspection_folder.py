"""The output folder of an inspection: new files, or those of an earlier one that are replaced."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.interruption import Interruption

DOCUMENT = "inspection.json"
PAGE = "report.html"


class InspectionFolder:
    """A folder that keeps its other files.

    Args:
        path: it need not exist.
        overwrite: whether an earlier inspection gives way.

    Raises:
        ExperimentError: it holds an earlier inspection, or cannot be written. Nothing is written before :meth:`write`.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        self._earlier: set[str] = set()
        if path.exists() and not path.is_dir():
            raise ExperimentError(f"The output {path} is no folder: choose another with --output.")
        if (path / DOCUMENT).exists():
            if not overwrite:
                raise ExperimentError(
                    f"{path} holds an earlier inspection: replace it by --overwrite, or choose another folder with "
                    "--output."
                )
            self._earlier = self._files_of_earlier()
        # A folder that is made now would stay empty if the inspection failed.
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise ExperimentError(
                f"The output folder {path} cannot be written ({error.strerror}): choose another with --output."
            ) from error

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files in place of the earlier inspection's.

        Raises:
            ExperimentError: a file of another origin stands where one would be written. Nothing has been changed then.
            OSError: the disk is full, or the like.
        """
        foreign = [name for name in files if (self.path / name).exists() and name not in self._earlier]
        if foreign:
            raise ExperimentError(
                f"{', '.join(str(self.path / name) for name in foreign)} would be replaced and belongs to no earlier "
                "inspection: move it away, or choose another folder with --output."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        partial = {name: self.path / f"{name}.part" for name in files}
        try:
            for name, content in files.items():
                partial[name].write_bytes(content)
            # From here on an interruption would leave files of two inspections: it has to wait for a few renamings.
            with Interruption(lambda: None):
                for name in self._earlier - set(files):
                    (self.path / name).unlink(missing_ok=True)
                for name in files:
                    os.replace(partial[name], self.path / name)
        finally:
            for place in partial.values():
                place.unlink(missing_ok=True)

    def _files_of_earlier(self) -> set[str]:
        place = self.path / DOCUMENT
        try:
            files = json.loads(place.read_text())["files"]
        except (OSError, ValueError, TypeError, KeyError):
            files = None
        # A name with a folder in it was not written by an inspection.
        if not isinstance(files, list) or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise ExperimentError(
                f"{place} was not written by an inspection: move it away, or choose another folder with --output."
            )
        return {*files, DOCUMENT}
