"""The idx reader: every type and shape comes back; every kind of damage is named."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from curvlib.experiments import ExperimentError, read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode(array, code):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(sorted(CODES)), compressed=st.booleans())
def test_every_array_comes_back(tmp_path_factory, data, kind, compressed):
    array = data.draw(arrays(np.dtype(kind), array_shapes(min_dims=1, max_dims=4, max_side=4)))
    path = tmp_path_factory.mktemp("idx") / "file"
    content = encode(array, CODES[kind])
    path.write_bytes(gzip.compress(content) if compressed else content)
    result = read_idx(path)
    assert result.dtype == array.dtype
    assert result.dtype.isnative
    np.testing.assert_array_equal(result, array)


GOOD = encode(np.arange(12, dtype=np.uint8).reshape(3, 4), 0x08)
# A fixed time in the header: gzip otherwise writes the current one.
COMPRESSED = gzip.compress(GOOD, mtime=0)


# Named cases: parallel workers must collect the same tests, and names made of the bytes would be unreadable.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "no idx file", id="empty"),
        pytest.param(b"\x89PNG" + GOOD, "no idx file", id="another-format"),
        pytest.param(b"\x00\x00\x0a\x01" + GOOD[4:], "no idx file", id="unknown-type"),
        pytest.param(GOOD[:7], "ends inside its header: 2 dimensions need 12 bytes, got 7", id="header-cut"),
        pytest.param(GOOD[:-1], r"cut or damaged.*shape \(3, 4\) of uint8.*24 bytes.*got 23", id="too-short"),
        pytest.param(GOOD + b"\x00", "cut or damaged", id="too-long"),
        pytest.param(COMPRESSED[:-9], "Cannot read", id="compressed-cut"),
        pytest.param(COMPRESSED[:10] + b"nonsense" * 4, "Cannot read", id="compressed-damaged"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ExperimentError, match="Cannot read"):
        read_idx(tmp_path / "nothing")
