"""Run the benchmarks as a script: ``python benchmarks/run.py`` does what ``python -m benchmarks`` does."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # A script finds its own folder's modules only; the package is one folder up.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
