"""``python -m curvlib.experiments`` is the command ``curvlib``."""

from curvlib.experiments.command_line import main

if __name__ == "__main__":
    main(prog_name="curvlib")
