"""A text file as sequences of characters, each with the character that follows.

Symbols: N sequences, T positions, C different characters.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.options import Bounds, check_options, option
from curvlib.experiments.sequences import Sequences, SequenceSource

_TEST_PERCENT = 10
_GZIP = b"\x1f\x8b"
_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class CharacterText(SequenceSource):
    """The characters of a UTF-8 text file, which may be compressed by gzip.

    The last tenth of the text is for tests, the rest for training. Each part is cut into sequences of T characters that
    follow each other; the target of a character is the next one. A network sees every sequence from its own beginning
    alone, so its first characters are harder to guess than in a text that is read in one go. The alphabet is that of
    the whole file, in the order of the code points.

    Args:
        length: characters of a sequence T.
    """

    reads_files = True

    length: int = option(64, "characters of a sequence", Bounds(at_least=1))

    def __post_init__(self) -> None:
        check_options("problem", self)

    @property
    def sizes(self) -> None:
        """As many as the file has."""
        return

    @property
    def origin(self) -> str:
        """Text file."""
        return "text file in --data"

    def load(self, path: Path | None) -> tuple[Sequences, Sequences]:
        """Return the sequences of both parts.

        Args:
            path: the text file.

        Raises:
            ExperimentError: no file, no UTF-8 text, too few characters, or one that is repeated throughout.
        """
        if path is None:
            raise ExperimentError("A text file is needed, and none was given: use --data FILE.")
        content = _read(path)
        text = _decoded(path, content)
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        test = len(text) * _TEST_PERCENT // 100
        if test <= self.length:
            needed = -(-(self.length + 1) * 100 // _TEST_PERCENT)
            raise ExperimentError(
                f"{path} has {len(text)} characters, which is too short: sequences of {self.length} need at least "
                f"{needed}, a tenth of which is for tests. Give a longer text, or shorter sequences with "
                "--set problem.length=T."
            )
        if len(alphabet) < 2:
            raise ExperimentError(f"{path} repeats one character, {text[0]!r}: there is nothing to guess. Give a text.")
        codes = torch.tensor([alphabet[character] for character in text])
        fingerprint = f"{len(text)} characters, sha256 {hashlib.sha256(content).hexdigest()[:_DIGITS]}"
        parts = (codes[: len(text) - test], codes[len(text) - test :])
        train, held_out = (_cut(part, self.length, len(alphabet), fingerprint) for part in parts)
        return train, held_out


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ExperimentError(f"A text file is needed, and {path} is a folder: use --data FILE.")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except FileNotFoundError:
        raise ExperimentError(f"The text file {path} does not exist: check --data.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"The text file {path} cannot be read ({error}): check --data.") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(
            f"{path} is no UTF-8 text (byte {error.start}: {error.reason}): convert it, or give another with --data."
        ) from None
    if not text:
        raise ExperimentError(f"The text file {path} is empty: give another with --data.")
    return text


def _cut(codes: Tensor, length: int, symbols: int, fingerprint: str) -> Sequences:
    """Return the sequences of a part; what is left at its end is dropped."""
    count = (len(codes) - 1) // length
    return Sequences(
        inputs=codes[: count * length].view(count, length),
        targets=codes[1 : count * length + 1].view(count, length),
        symbols=symbols,
        fingerprint=fingerprint,
    )
