"""The benchmarks run and report what they should; times and memory are never asserted, since machines differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("curvlinops")
ROOT = Path(__file__).resolve().parents[2]


def benchmarks(*arguments, script=("-m", "benchmarks")):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run of three benchmarks at tiny sizes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    names = ("ggn-small", "kfac-statistics", "steps")
    only = [word for name in names for word in ("--only", name)]
    done = benchmarks("--tiny", "--threads", 1, "--repeats", 2, "--no-memory", "--output", folder, *only)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text(), done.stdout


def test_the_report_names_its_circumstances(report):
    values, table, printed = report
    assert values["environment"]["threads"] == 1
    assert values["environment"]["torch"] in table
    assert values["environment"]["curvlinops-for-pytorch"] == "3.0.1"
    assert values["settings"] == {"repeats": 2, "tiny": True}
    assert table in printed


def test_every_subject_has_a_ratio_within_its_bounds(report):
    values, table, _ = report
    assert [benchmark["name"] for benchmark in values["benchmarks"]] == ["ggn-small", "kfac-statistics", "steps"]
    for benchmark in values["benchmarks"]:
        gradient, *rows = benchmark["rows"]
        assert gradient["subject"] == "gradient"
        assert gradient["ratio"] is None
        for row in rows:
            ratio = row["ratio"]
            assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
            assert ratio["repeats"] <= 2
            assert row["peak_mib"] is None
            assert row["subject"] in table


def test_both_peers_are_measured_beside_curvlib(report):
    values, _, _ = report
    for benchmark in values["benchmarks"][:2]:
        libraries = {row["subject"].partition(":")[0] for row in benchmark["rows"]}
        assert {"curvlib", "curvlinops", "BackPACK"} <= libraries


def test_a_target_is_judged_by_the_median(report):
    values, _, _ = report
    targets = [target for benchmark in values["benchmarks"] for target in benchmark["targets"]]
    assert [target["at_most"] for target in targets] == [1.5, 2.1, 1.3]
    for target in targets:
        assert target["met"] == (target["ratio"]["median"] <= target["at_most"])


def test_whole_steps_say_how_much_work_they_counted(report):
    values, _, _ = report
    notes = {row["subject"]: row["note"] for row in values["benchmarks"][2]["rows"]}
    assert "iterations of conjugate gradients" in notes["curvlib: first Hessian-free step (preset)"]
    assert "gradients counted" in notes["curvlib: K-FAC step (preset)"]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of the resident set is Linux's")
def test_peak_memory_of_one_subject_as_a_script():
    """The plain gradient of the small network keeps 64 x 32 numbers a layer: far below 64 MiB, the code excluded."""
    arguments = ("--only", "ggn-small", "--memory-of", "gradient", "--threads", 1)
    done = benchmarks(*arguments, script=("benchmarks/run.py",))
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["peak_mib"] < 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing"), "kfac-statistics"),
        (("--repeats", "0"), "0 is not in the range x>=1"),
        (("--only", "ggn-small", "--output", "/proc/nowhere"), "name a folder that can be written"),
    ],
    ids=["unknown benchmark", "no repeats", "unwritable folder"],
)
def test_bad_options_are_refused_before_anything_is_measured(arguments, message):
    done = benchmarks(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "gradient" not in done.stderr
