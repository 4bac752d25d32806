"""Records and the folder that keeps them."""

import dataclasses
import json
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.experiments import ExperimentError, Record, ResultsFolder, Status

numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
record_strategy = st.builds(
    Record,
    method=st.sampled_from(["kfac", "sgd"]),
    step=st.integers(0, 10**9),
    epoch=numbers,
    seconds=numbers,
    gradients=numbers,
    loss=maybe,
    train_metric=maybe,
    test_metric=maybe,
    batch_loss=maybe,
    damping=maybe,
    ratio=maybe,
    accepted=st.none() | st.booleans(),
    status=st.sampled_from(Status),
    note=st.none() | st.text(max_size=20),
)
ONE = Record(
    method="sgd", step=1, epoch=0.5, seconds=0.1, gradients=1, loss=2.0, train_metric=3.0, test_metric=4.0
)  # fmt: skip


@given(record=record_strategy)
def test_records_come_back_from_json(record):
    line = record.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == record


def test_numbers_that_are_not_finite_become_null():
    broken = Record(**{**vars(ONE), "loss": float("nan"), "ratio": float("-inf")})
    assert json.loads(broken.to_json())["loss"] is None
    assert json.loads(broken.to_json())["ratio"] is None


def folder_with(tmp_path, text):
    folder = ResultsFolder(tmp_path)
    folder.make_writable()
    folder.results.write_text(text)
    return folder


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    folder = folder_with(tmp_path, ONE.to_json() + "\n" + ONE.to_json()[:30])
    assert folder.records() == [ONE]


@pytest.mark.parametrize("line", ["{", '{"method": "sgd"}', '{"status": "lost"}', "[]"])
def test_a_damaged_line_is_named(tmp_path, line):
    folder = folder_with(tmp_path, f"{ONE.to_json()}\n{line}\n{ONE.to_json()}\n")
    with pytest.raises(ExperimentError, match=r"Line 2 of .*results\.jsonl"):
        folder.records()


def test_a_record_after_a_torn_line_is_a_line_of_its_own(tmp_path):
    folder = folder_with(tmp_path, ONE.to_json() + "\n" + ONE.to_json()[:30])
    two = dataclasses.replace(ONE, step=2)
    folder.append(two)
    assert folder.records() == [ONE, two]
    assert folder.results.read_text() == f"{ONE.to_json()}\n{two.to_json()}\n"


@pytest.mark.parametrize("length", [10, 5000, 20_000])
def test_a_torn_line_of_any_length_is_removed(tmp_path, length):
    alone = folder_with(tmp_path / "alone", "x" * length)
    alone.append(ONE)
    assert alone.records() == [ONE]
    behind = folder_with(tmp_path / "behind", f"{ONE.to_json()}\n" * 60 + "x" * length)
    behind.append(ONE)
    assert behind.records() == [ONE] * 61


def test_a_line_that_the_system_writes_in_pieces_is_whole(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, "")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:7]))
    folder.append(ONE)
    assert folder.results.read_text() == ONE.to_json() + "\n"


WRONG_FIELDS = {
    "step": (1.5, "'step' must be an integer, got 1.5"),
    "epoch": ("1", "'epoch' must be a number, got '1'"),
    "seconds": (None, "'seconds' must be a number, got None"),
    "gradients": (True, "'gradients' must be a number, got True"),
    "loss": ("low", "'loss' must be a number or null, got 'low'"),
    "method": (3, "'method' must be a text, got 3"),
    "accepted": (1, "'accepted' must be true or false or null, got 1"),
    "status": ("lost", "'status' must be one of running, finished, diverged, failed, got 'lost'"),
    "note": ([], "'note' must be a text or null"),
    "speed": (1, "'speed' is no field"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_of_a_wrong_type_is_named_with_its_line(tmp_path, name):
    value, message = WRONG_FIELDS[name]
    edited = json.dumps({**json.loads(ONE.to_json()), name: value})
    folder = folder_with(tmp_path, f"{ONE.to_json()}\n{edited}\n")
    with pytest.raises(ExperimentError, match=rf"Line 2 of .*results\.jsonl is no record: .*{re.escape(message)}"):
        folder.records()


def test_a_missing_field_and_a_number_that_is_none_are_named(tmp_path):
    values = json.loads(ONE.to_json())
    del values["seconds"]
    with pytest.raises(ExperimentError, match=r"Line 1 .*the field 'seconds' is missing"):
        folder_with(tmp_path, json.dumps(values) + "\n").records()
    with pytest.raises(ExperimentError, match=r"Line 1 .*NaN is not standard JSON"):
        folder_with(tmp_path, ONE.to_json().replace("2.0", "NaN") + "\n").records()


def test_bytes_that_are_no_text_are_named(tmp_path):
    folder = folder_with(tmp_path, "")
    folder.results.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ExperimentError, match="Line 1 of"):
        folder.records()


def test_checkpoints_come_back_and_damaged_ones_are_named(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.make_writable()
    assert folder.load_checkpoint("sgd") is None
    folder.save_checkpoint("sgd", {"step": 3, "model": {"weight": torch.ones(2)}})
    state = folder.load_checkpoint("sgd")
    assert state["step"] == 3
    assert torch.equal(state["model"]["weight"], torch.ones(2))
    path = folder.checkpoints / "sgd.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExperimentError, match=r"sgd\.pt cannot be read.*train sgd from its start"):
        folder.load_checkpoint("sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1, 2]", "was not written by a comparison"),
        ('{"editor": "mine"}', "was not written by a comparison"),
        ('{"problem": 1, "method": "sgd", "budget": "1 s", "seed": "0"}', "was not written by a comparison"),
    ],
)
def test_settings_that_are_missing_damaged_or_foreign_are_named(tmp_path, text, message):
    folder = ResultsFolder(tmp_path)
    with pytest.raises(ExperimentError, match=r"settings\.json.* is missing"):
        folder.read_settings()
    folder.settings.write_text(text)
    with pytest.raises(ExperimentError, match=rf"settings\.json {message}"):
        folder.read_settings()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=r"cannot be written.*--output"):
        ResultsFolder(tmp_path / "file" / "out").make_writable()
