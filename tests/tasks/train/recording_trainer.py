"""The trainer, with a note of every row that it learned from: what test_train.py looks at after a change of ranks.

    python -m tests.tasks.train.recording_trainer RUN.json                            or with torchrun

Each rank appends a line {"step", "rank", "rows"} for each of its steps to rows.jsonl in the run's folder; a row is the
sha256 of its masked tokens, which no other block has.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tasks.train import trainer as train
from tasks.train.__main__ import exit_with_status, main
from tasks.train.checkpoint import TrainingProgress
from tasks.train.trainer import Trainer

FILE = "rows.jsonl"


def row_names(input_ids_BL: torch.Tensor) -> list[str]:
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in input_ids_BL]


def noting() -> None:
    """From now on the trainer notes what it does; nothing else about it changes."""
    step, advance = train.gradient_step, Trainer._advance
    seen: list[str] = []

    def gradient_step(distiller: Any, supervision: Any, batches: Any, *rest: Any) -> torch.Tensor:
        seen[:] = [name for batch in batches for name in row_names(batch.input_ids)]
        return step(distiller, supervision, batches, *rest)

    def advanced(self: Trainer, progress: TrainingProgress, tokens: int) -> TrainingProgress:
        after = advance(self, progress, tokens)
        line = {"step": after.step, "rank": self.world.rank, "rows": seen}
        with (Path(self.run.folder) / FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return after

    train.gradient_step = gradient_step
    Trainer._advance = advanced  # type: ignore[method-assign]


if __name__ == "__main__":
    noting()
    exit_with_status(main)
