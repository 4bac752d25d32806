"""The folder that keeps a comparison: safe against interruption at every moment, and careful with other files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.records import Record

# By these keys a settings.json is known to be that of a comparison.
_SIGNATURE = ("problem", "method", "budget", "seed")
_BLOCK = 4096


class ResultsFolder:
    """Folder of one comparison: ``results.jsonl``, ``settings.json``, ``comparison.png`` and ``checkpoints/``.

    Every record is one appended line that has reached the disk before training goes on; every other file is written
    beside its place and then moved there, so that no moment leaves half a file.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results.jsonl"
        self.settings = path / "settings.json"
        self.figure = path / "comparison.png"
        self.checkpoints = path / "checkpoints"

    @property
    def has_results(self) -> bool:
        """Whether a comparison was started here."""
        return self.results.exists() or self.settings.exists()

    def check_kinds(self) -> None:
        """Refuse a file where a folder belongs, and a folder where a file belongs.

        Raises:
            ExperimentError: names it.
        """
        for place in (self.path, self.checkpoints):
            if place.exists() and not place.is_dir():
                raise ExperimentError(
                    f"The output {self.path} cannot be used: {place} is no folder. Choose another with --output."
                )
        for place in (self.results, self.settings, self.figure):
            if place.exists() and not place.is_file():
                raise ExperimentError(
                    f"The output {self.path} cannot be used: {place} is no file. Choose another with --output."
                )

    def make_writable(self) -> None:
        """Make the folder and write to it once.

        Raises:
            ExperimentError: that is not possible.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path), tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise ExperimentError(
                f"The output folder {self.path} cannot be written ({error.strerror}): choose another with --output."
            ) from error

    def files_of(self, methods: Iterable[str]) -> list[Path]:
        """Return every file here that a comparison of these methods writes, those that exist alone."""
        # Half-written files are left by a process that was killed.
        whole = [self.results, self.settings, self.figure, *(self._checkpoint(method) for method in methods)]
        return [file for place in whole for file in (place, _partial(place)) if file.exists()]

    def delete(self, files: Iterable[Path]) -> None:
        """Delete files of this folder.

        Raises:
            ExperimentError: one cannot be deleted.
        """
        for file in files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise ExperimentError(
                    f"{file} cannot be deleted ({error.strerror}): choose another folder with --output."
                ) from error

    def write_settings(self, settings: Mapping[str, str]) -> None:
        """Keep the settings that a resumed run must share."""
        _replace(self.settings, json.dumps(dict(settings), indent=2).encode() + b"\n")

    def read_settings(self) -> dict[str, str]:
        """Return the settings of the comparison that was started here.

        Raises:
            ExperimentError: they are missing, cannot be read, or are none of a comparison.
        """
        remedy = "move it away, or choose another folder with --output"
        try:
            values = json.loads(self.settings.read_bytes())
        except FileNotFoundError:
            raise ExperimentError(f"{self.settings}, the settings of a comparison, is missing.") from None
        except (OSError, ValueError) as error:
            raise ExperimentError(f"{self.settings} cannot be read ({error}): {remedy}.") from error
        is_text = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
        if not is_text or not all(key in values for key in _SIGNATURE):
            raise ExperimentError(f"{self.settings} was not written by a comparison: {remedy}.")
        return values

    def append(self, record: Record) -> None:
        """Add a record to the file, for good; what a failed write left of a line is removed first."""
        content = memoryview(record.to_json().encode() + b"\n")
        descriptor = os.open(self.results, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(descriptor)
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def records(self) -> list[Record]:
        """Return all records; a last line that a power failure cut short is left out.

        Raises:
            ExperimentError: another line is no record, or the file cannot be read.
        """
        try:
            *lines, _ = self.results.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ExperimentError(f"{self.results} cannot be read ({error.strerror}).") from error
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(Record.from_json(line.decode()))
            except ValueError as error:
                raise ExperimentError(
                    f"Line {number} of {self.results} is {error}. Repair it or start anew with --overwrite."
                ) from error
        return records

    def replace_records(self, records: Iterable[Record]) -> None:
        """Write the file anew with these records alone."""
        _replace(self.results, "".join(record.to_json() + "\n" for record in records).encode())

    def write_figure(self, png: bytes) -> None:
        """Keep the picture of the comparison."""
        _replace(self.figure, png)

    def save_checkpoint(self, method: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a run in place of the one before."""
        path = self._checkpoint(method)
        temporary = _partial(path)
        torch.save(dict(state), temporary)
        os.replace(temporary, path)

    def load_checkpoint(self, method: str) -> dict[str, Any] | None:
        """Return the last state of a run, every tensor on the device that it was saved from, or None if there is none.

        Raises:
            ExperimentError: the file is damaged.
        """
        path = self._checkpoint(method)
        if not path.exists():
            return None
        try:
            return dict(torch.load(path, weights_only=True))
        except Exception as error:  # torch.load documents no exception types; whatever it is, the file is no use
            raise ExperimentError(
                f"The checkpoint {path} cannot be read ({error}): delete it to train {method} from its start."
            ) from error

    def _checkpoint(self, method: str) -> Path:
        # Names also come from settings.json, which somebody may have edited: no path may lead out of the folder.
        return self.checkpoints / f"{Path(method).name}.pt"


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _replace(path: Path, content: bytes) -> None:
    temporary = _partial(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cut_torn_line(descriptor: int) -> None:
    """Truncate a file behind its last line end: otherwise the next line would be glued to the rest of a torn one."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        os.lseek(descriptor, start, os.SEEK_SET)
        whole = os.read(descriptor, end - start).rfind(b"\n") + 1
        if whole > 0:
            end = start + whole
            break
        end = start
    if end < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, end)
