"""Ctrl-C, SIGTERM and --resume of the command ``curvlib``."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from command_line_calls import FAST, ROOT, call, compare, results, without_time

from curvlib.experiments.progress import ProgressBars


def press_ctrl_c(monkeypatch, steps):
    """Interrupt at the given step of all."""
    left = iter(range(steps, -1, -1))

    def advanced(self, method, fraction):
        if next(left, 1) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "advanced", advanced)


def test_ctrl_c_keeps_everything_and_tells_how_to_go_on(tmp_path, monkeypatch):
    words = ("--method", "kfac", "--method", "adam", *FAST, "--set", "adam.lr=0.002", "--seed", 2)
    whole = compare(tmp_path / "whole", *words)
    assert whole.exit_code == 0
    assert "unfinished" not in whole.output
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, steps=9)
        cut = compare(tmp_path / "a folder", *words)
    assert cut.exit_code == 130
    assert "adam unfinished" in cut.output
    assert (tmp_path / "a folder" / "comparison.png").exists()
    command = next(line for line in cut.output.splitlines() if "--resume" in line)
    _, *arguments = shlex.split(command)
    assert arguments[0] == "compare"
    resumed = call(*arguments)
    assert resumed.exit_code == 0, resumed.output
    assert without_time(results(tmp_path / "a folder")) == without_time(results(tmp_path / "whole"))


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "curvlib.experiments", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell's background jobs ignore interrupts and hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_lines(process, path, count):
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_and_a_resumption_from_another_process(tmp_path, number):
    words = ["compare", "--problem", "digits-classifier", "--method", "sgd", "--steps", "2000", "--threads", "1"]
    cut = tmp_path / "cut"
    process = start(*words, "--output", str(cut))
    wait_for_lines(process, cut / "results.jsonl", 5)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "sgd unfinished" in output
    assert "finishing the current step" in output
    assert (cut / "comparison.png").exists()
    before = results(cut)
    assert len(before) >= 5
    # Everything but the seed is recognised as the same in this process.
    refused = call(*words, "--output", cut, "--resume", "--seed", 3)
    assert refused.exit_code == 2
    assert "started with other settings: seed was 0, is now 3. Resume" in refused.output
    assert call(*words, "--output", cut, "--resume").exit_code == 0
    assert results(cut)[: len(before)] == before
    assert call(*words, "--output", tmp_path / "whole").exit_code == 0
    assert without_time(results(cut)) == without_time(results(tmp_path / "whole"))


def test_an_interrupt_before_the_first_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ProgressBars, "started", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("curvlib.experiments.runner.Run", lambda *_: signal.raise_signal(signal.SIGTERM))
    outcome = compare(tmp_path / "out", "--method", "sgd", *FAST)
    assert outcome.exit_code == 130
    assert "Nothing has been recorded yet." in outcome.output
    assert "results.jsonl" not in outcome.output
    assert "│" not in outcome.output
    monkeypatch.undo()
    assert compare(tmp_path / "out", "--method", "sgd", *FAST, "--resume").exit_code == 0


def test_a_larger_budget_goes_on_with_a_finished_comparison(tmp_path):
    words = ("--problem", "digits-classifier", "--method", "adam", "--threads", 1)
    assert compare(tmp_path / "out", *words, "--steps", 6).exit_code == 0
    before = results(tmp_path / "out")
    outcome = compare(tmp_path / "out", *words, "--steps", 12, "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert without_time(results(tmp_path / "out"))[: len(before) - 1] == without_time(before)[:-1]
    assert compare(tmp_path / "whole", *words, "--steps", 12).exit_code == 0
    last = [without_time(results(tmp_path / name))[-1] for name in ("out", "whole")]
    assert last[0] == last[1]
    for budget in (("--steps", 3), ("--seconds", 100)):
        refused = compare(tmp_path / "out", *words, *budget, "--resume")
        assert refused.exit_code == 2
        assert "budget was 12 steps, is now" in refused.output


def test_a_torn_line_is_no_obstacle_to_a_resumption(tmp_path):
    words = ("--method", "sgd", *FAST)
    assert compare(tmp_path / "whole", *words).exit_code == 0
    assert compare(tmp_path / "out", *words).exit_code == 0
    text = (tmp_path / "out" / "results.jsonl").read_text()
    (tmp_path / "out" / "results.jsonl").write_text(text[:-40])
    (tmp_path / "out" / "checkpoints" / "sgd.pt").unlink()
    for _ in range(2):
        outcome = compare(tmp_path / "out", *words, "--resume")
        assert outcome.exit_code == 0, outcome.output
    assert without_time(results(tmp_path / "out")) == without_time(results(tmp_path / "whole"))


def test_a_record_that_somebody_broke_is_named(tmp_path):
    words = ("--method", "sgd", *FAST)
    assert compare(tmp_path, *words).exit_code == 0
    path = tmp_path / "results.jsonl"
    path.write_text(re.sub(r'"loss": [0-9.]+', '"loss": "low"', path.read_text(), count=1))
    outcome = compare(tmp_path, *words, "--resume")
    assert outcome.exit_code == 2
    message = re.sub(r"\s+", " ", outcome.output)
    assert "Line 1 of" in message
    assert "the field 'loss' must be a number or null, got 'low'" in message
