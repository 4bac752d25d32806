"""Reader of idx files, the format of MNIST: a magic number, the sizes as big-endian 32-bit integers, the raw data."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curvlib.experiments.errors import ExperimentError

_GZIP_MAGIC = b"\x1f\x8b"
# Third byte of the magic number; every type is stored big-endian.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> NDArray[np.generic]:
    """Return the array that an idx file holds, in the machine's byte order.

    The file may be compressed with gzip, whatever it is called. Layout: two zero bytes, a type byte, the number of
    dimensions, one big-endian 32-bit size a dimension, then the entries with the last dimension running fastest.

    Args:
        path: the file.

    Returns:
        An array of the sizes and the type that the header names.

    Raises:
        ExperimentError: the file is missing, cannot be read or decompressed, has a wrong magic number, or its length
            is not what its header says.
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\x00\x00" or content[2] not in _TYPES:
        raise ExperimentError(
            f"{path} is no idx file: expected it to start with 00 00, a type byte in "
            f"{', '.join(f'{code:02x}' for code in _TYPES)} and the number of dimensions, got {content[:4].hex(' ')!r}."
        )
    dtype, dimensions = np.dtype(_TYPES[content[2]]), content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ExperimentError(
            f"{path} ends inside its header: {dimensions} dimensions need {start} bytes, got {len(content)}."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ExperimentError(
            f"{path} is cut or damaged: its header says shape {shape} of {dtype.name}, which is {expected} bytes "
            f"with the header, got {len(content)}. Fetch the file again."
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == _GZIP_MAGIC else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"Cannot read {path}: {error}.") from error
