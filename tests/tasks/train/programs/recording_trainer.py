"""A program for tests: the trainer, which also records every row that it trains on.

    python -m tests.tasks.train.programs.recording_trainer RUN.json                            or with torchrun

Started by test_trainer.py to compare the rows before and after a change of ranks. Each rank appends a line
{"step", "rank", "rows"} per step to rows.jsonl in the run folder. A row is identified by the sha256 of its masked
tokens, which no other block shares.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tasks.train import trainer
from tasks.train.__main__ import exit_with_status, main
from tasks.train.checkpoint import TrainingProgress
from tasks.train.trainer import Trainer

FILE = "rows.jsonl"


def row_names(input_ids_BL: torch.Tensor) -> list[str]:
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in input_ids_BL]


def record_rows() -> None:
    """Makes the trainer of this process record its rows; changes nothing else about it."""
    gradient_step, advance = trainer.gradient_step, Trainer._advance
    seen: list[str] = []

    def recording_step(student_with_loss: Any, signal_source: Any, batches: Any, *rest: Any) -> torch.Tensor:
        seen[:] = [name for batch in batches for name in row_names(batch.input_ids)]
        return gradient_step(student_with_loss, signal_source, batches, *rest)

    def recording_advance(self: Trainer, progress: TrainingProgress, tokens: int) -> TrainingProgress:
        after = advance(self, progress, tokens)
        line = {"step": after.step, "rank": self.ranks.rank, "rows": seen}
        with (Path(self.run.folder) / FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return after

    trainer.gradient_step = recording_step
    Trainer._advance = recording_advance  # type: ignore[method-assign]


if __name__ == "__main__":
    record_rows()
    exit_with_status(main)
