"""The output folder before a comparison: what is refused, what is deleted, what is never touched."""

import json
import os

import pytest
from small_comparisons import comparison_of, run

from curvlib.experiments import ExperimentError, ResultsFolder, prepare_folder, reopen_folder, replace_folder

COMPARISON = comparison_of("sgd", "adam", steps=2)
PREPARATIONS = {"new": prepare_folder, "overwrite": replace_folder, "resume": reopen_folder}


def tree(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_overwriting_deletes_what_a_comparison_wrote_and_nothing_else(tmp_path):
    run(comparison_of("sgd", "kfac", steps=2), tmp_path)
    written = set(tree(tmp_path))
    assert written == {
        "results.jsonl", "settings.json", "comparison.png", "checkpoints/sgd.pt", "checkpoints/kfac.pt"
    }  # fmt: skip
    put(tmp_path / "results.jsonl.partial", "a rest")
    for name in ("notes.txt", "checkpoints/best.pt", "checkpoints/my-model.pt", "other/settings.json"):
        put(tmp_path / name)
    replace_folder(COMPARISON, ResultsFolder(tmp_path))
    left = tree(tmp_path)
    assert json.loads(left.pop("settings.json")) == COMPARISON.settings()
    assert left == dict.fromkeys(
        ["notes.txt", "checkpoints/best.pt", "checkpoints/my-model.pt", "other/settings.json"], b"mine"
    )


@pytest.mark.parametrize(
    "settings",
    [None, '{"editor": "vim"}', "[]", "{", '{"problem": 1, "method": 2, "budget": 3, "seed": 4}'],
    ids=["none", "foreign", "list", "torn", "numbers"],
)
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_files_of_another_origin_are_never_replaced(tmp_path, settings, preparation):
    if settings is not None:
        put(tmp_path / "settings.json", settings)
    for name in ("results.jsonl", "comparison.png", "checkpoints/sgd.pt"):
        put(tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(ExperimentError) as caught:
        PREPARATIONS[preparation](COMPARISON, ResultsFolder(tmp_path))
    assert "results.jsonl" in str(caught.value) or "settings.json" in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["results.jsonl", "comparison.png", "checkpoints/sgd.pt"])
@pytest.mark.parametrize("preparation", ["new", "overwrite"])
def test_a_single_foreign_file_is_named(tmp_path, name, preparation):
    put(tmp_path / name)
    with pytest.raises(ExperimentError, match=rf"{name} would be replaced and belongs to no earlier comparison"):
        PREPARATIONS[preparation](COMPARISON, ResultsFolder(tmp_path))
    assert tree(tmp_path) == {name: b"mine"}


def test_a_foreign_checkpoint_of_a_method_that_was_not_compared_is_named(tmp_path):
    run(comparison_of("kfac", steps=2), tmp_path)
    put(tmp_path / "checkpoints" / "sgd.pt")
    before = tree(tmp_path)
    with pytest.raises(ExperimentError, match=r"sgd\.pt would be replaced"):
        replace_folder(COMPARISON, ResultsFolder(tmp_path))
    assert tree(tmp_path) == before


def test_names_in_edited_settings_lead_nowhere_else(tmp_path):
    folder = tmp_path / "out"
    settings = {"problem": "x", "method": "../../precious, sgd", "budget": "1 s", "seed": "0"}
    put(folder / "settings.json", json.dumps(settings))
    put(tmp_path / "precious.pt")
    (folder / "checkpoints").mkdir()
    replace_folder(COMPARISON, ResultsFolder(folder))
    assert (tmp_path / "precious.pt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_keeps_what_it_has(tmp_path, monkeypatch):
    run(COMPARISON, tmp_path)
    before = tree(tmp_path)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ExperimentError, match=r"cannot be written \(Permission denied\).*--output"):
        replace_folder(COMPARISON, ResultsFolder(tmp_path))
    assert tree(tmp_path) == before


def test_a_file_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    run(COMPARISON, tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(ExperimentError, match=r"cannot be deleted \(Permission denied\).*--output"):
        replace_folder(COMPARISON, ResultsFolder(tmp_path))
    assert ResultsFolder(tmp_path).read_settings() == COMPARISON.settings()


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_an_output_that_is_a_file_is_named(tmp_path, preparation):
    put(tmp_path / "file")
    with pytest.raises(ExperimentError, match="file is no folder") as caught:
        PREPARATIONS[preparation](COMPARISON, ResultsFolder(tmp_path / "file"))
    assert "--overwrite" not in str(caught.value)
    with pytest.raises(ExperimentError, match=r"cannot be written|nothing to resume"):
        PREPARATIONS[preparation](COMPARISON, ResultsFolder(tmp_path / "file" / "out"))
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["results.jsonl", "settings.json", "comparison.png"])
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name, preparation):
    put(tmp_path / name / "inside")
    with pytest.raises(ExperimentError, match=rf"{name} is no file"):
        PREPARATIONS[preparation](COMPARISON, ResultsFolder(tmp_path))
    assert tree(tmp_path) == {f"{name}/inside": b"mine"}


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path):
    put(tmp_path / "checkpoints")
    with pytest.raises(ExperimentError, match="checkpoints is no folder"):
        prepare_folder(COMPARISON, ResultsFolder(tmp_path))


def test_damaged_records_are_named_before_training_goes_on(tmp_path):
    run(COMPARISON, tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ExperimentError, match=r"Line \d+ of .*results\.jsonl is no record"):
        reopen_folder(COMPARISON, ResultsFolder(tmp_path))
