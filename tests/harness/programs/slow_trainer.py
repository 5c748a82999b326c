"""Runs the trainer at five steps per second after step STEP until FILE exists, so that a test can kill it in training.

    python -m tests.harness.programs.slow_trainer STEP FILE RUN.json

A recipe starts it by `train.launcher`, which is not part of any key: the training run has the same weights.
"""

import json
import sys
import time
from pathlib import Path

from tasks.train.__main__ import exit_with_status, main
from tasks.train.checkpoint import TrainingProgress
from tasks.train.trainer import Trainer

SECONDS_PER_STEP = 0.2


def slow_trainer(step: int, release: Path) -> str:
    """Returns the setting that slows the trainer down after `step`, until the file `release` exists."""
    command = [sys.executable, "-m", "tests.harness.programs.slow_trainer", str(step), str(release), "{run}"]
    return f"train.launcher={json.dumps(command)}"


def slow_down(step: int, release: Path) -> None:
    """Patches the trainer of this process so that it waits after each slow step."""
    advance = Trainer._advance

    def advance_slowly(self: Trainer, progress: TrainingProgress, tokens: int) -> TrainingProgress:
        after = advance(self, progress, tokens)
        if after.step >= step and not release.exists():
            time.sleep(SECONDS_PER_STEP)
        return after

    Trainer._advance = advance_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(int(sys.argv[1]), Path(sys.argv[2]))
    exit_with_status(lambda: main(sys.argv[3:]))
