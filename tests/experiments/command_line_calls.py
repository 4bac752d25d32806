"""Calls of the command ``curvlib`` inside the test process, and what they leave."""

import json
from pathlib import Path

from click.testing import CliRunner

from curvlib.experiments.command_line import main

ROOT = Path(__file__).parents[2]
FAST = ("--problem", "digits-classifier", "--batch-size", "100", "--steps", "6")


def call(*words, **options):
    return CliRunner().invoke(main, [str(word) for word in words], **options)


def compare(output, *words):
    return call("compare", "--output", output, *words)


def results(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
