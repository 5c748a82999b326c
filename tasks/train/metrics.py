"""Writes and reads metrics.jsonl, the training curves: rank 0 appends lines, and the flow reads them during the run.

    writer = MetricsWriter(run)
    writer.add(progress, losses, grad_norm, lr, step_counts, waited, due=True)       # writes a line
    lines = read_metrics(path)                                                       # a list of dictionaries

The file is on local disk. A line contains means over the steps since the previous line: loss and its terms, learning
rate, gradient norm, tokens per second, fraction of the time spent waiting for data and, on a GPU, model FLOP
utilisation. Validation results are separate lines. On resume, the file is cut back to the checkpoint's step, so no step
appears twice; each checkpoint ends a line, so no step is missing.
"""

import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storage.files.disk import writing
from storage.store import Store
from tasks.loader.batch import MaskingRule, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.models.forward import CHUNK_POSITIONS, hidden_rows, logits_in_chunks
from tasks.recipe.run_json import METRICS, RunSpec
from tasks.tokens.mask import IGNORE_INDEX
from tasks.train.checkpoint import TrainingProgress
from tasks.train.flops import Work
from tasks.train.setup import TrainingSetup
from tasks.train.step import StepCounts

LOSSES = ("loss", "distil", "cosine", "mlm")
"""Names of a step's losses in a line: the total and its terms, in the order of `loss.Losses`."""

HELDOUT_VARIANT = 1_000_000
"""Mask variant of validation. No training epoch uses it, and every validation does, so their results are comparable."""


class HeldoutLosses(NamedTuple):
    """Masked cross-entropy (nats per token) and top-1 accuracy on held-out blocks."""

    loss: float
    top1: float


class MetricsWriter:
    """Collects steps and appends lines. Tensors stay on their device until a line is due.

    `work`: FLOP per token and per position. `rate`: FLOP per second of all ranks. Without `work` or `rate`, lines have
    no `mfu`. Every method that writes raises FatalError if the disk is full or read-only.
    """

    def __init__(self, run: RunSpec, work: Work | None = None, rate: float = 0.0) -> None:
        self.path = Path(run.folder) / METRICS
        self.work, self.rate = work, rate
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._tokens = self._rows = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def cut_back(self, step: int) -> None:
        """Removes the lines after `step`, and an incomplete last line."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        fresh = self.path.with_suffix(".new")
        with self._writing():
            fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(fresh, self.path)  # atomic: a kill at this moment does not lose the earlier lines
        self._since = time.perf_counter()

    def add(
        self,
        progress: TrainingProgress,
        losses: Tensor,
        grad_norm: Tensor,
        lr: float,
        step_counts: StepCounts,
        waited: float,
        *,
        due: bool,
    ) -> None:
        """Adds one step, and writes a line if one is `due`.

        `losses`: [4], in the order of LOSSES. `waited`: seconds spent waiting for data since the start.
        """
        self._pending.append((losses, grad_norm.detach()))
        self._tokens += step_counts.tokens
        self._rows += step_counts.selected
        if not due:
            return
        seconds = time.perf_counter() - self._since
        means = torch.stack([step_losses for step_losses, _ in self._pending]).mean(0).tolist()
        self._append(
            {
                "step": progress.step,
                **dict(zip(LOSSES, means, strict=True)),
                "grad_norm": float(torch.stack([step_norm for _, step_norm in self._pending]).mean()),
                "lr": lr,
                "tokens": progress.tokens,
                "rows": self._rows,
                "tokens_per_second": self._tokens / seconds,
                "data_wait": (waited - self._waited) / seconds,
                "seconds": seconds,
                **self._mfu(seconds),
                "time": time.time(),
            }
        )
        self._pending, self._tokens, self._rows, self._waited = [], 0, 0, waited
        self._since = time.perf_counter()

    def validated(self, step: int, heldout: HeldoutLosses) -> None:
        """Writes a line of validation results.

        Call it right after a line of training metrics, so that the time of validation does not count as training time.
        """
        line = {"step": step, "heldout_loss": heldout.loss, "heldout_top1": heldout.top1, "time": time.time()}
        self._append(line)
        self._since = time.perf_counter()

    def _mfu(self, seconds: float) -> dict[str, float]:
        """Returns `mfu` of the steps since the last line, or nothing if work or rate is unknown."""
        if self.work is None or not self.rate:
            return {}
        return {"mfu": self.work.of(self._tokens, self._rows) / seconds / self.rate}

    def _append(self, line: dict[str, Any]) -> None:
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"the run folder {self.path.parent}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns all complete lines of a metrics file; a line that is still being written is left out.

    The result is empty if the file does not exist.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@torch.no_grad()
def heldout_loss(
    store: Store, run: RunSpec, setup: TrainingSetup, device: torch.device, autocast: torch.dtype | None
) -> HeldoutLosses:
    """Computes masked cross-entropy and top-1 accuracy over the first train.validate_rows held-out blocks."""
    student = setup.student
    dataset = BlockDataset(store, run.heldout, cached=False)
    masking = MaskingRule(setup.vocabulary, run.mask, every_position=False, counts=setup.token_counts)
    parts = np.concatenate([np.full(part.rows, n, np.int64) for n, part in enumerate(run.heldout)])
    rows = np.concatenate([np.arange(part.rows, dtype=np.int64) for part in run.heldout])
    parts, rows = parts[: run.train.validate_rows], rows[: run.train.validate_rows]
    size = run.train.micro_rows or min(run.train.batch_rows, 32)
    was_training = student.training
    student.train(False)
    loss, correct, masked = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for start in range(0, len(rows), size):
        chosen = slice(start, start + size)
        variants = np.full(len(rows[chosen]), HELDOUT_VARIANT, np.int64)
        batch = make_batch(dataset, masking, parts[chosen], rows[chosen], variants).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden_BMD = hidden_rows(student, batch.input_ids, batch.attention_mask, batch.positions)
            chunks = zip(
                logits_in_chunks(student, hidden_BMD.flatten(0, 1)),
                torch.split(batch.labels.flatten(), CHUNK_POSITIONS),
                strict=True,
            )
            for logits_nV, labels_n in chunks:
                loss += F.cross_entropy(logits_nV, labels_n, ignore_index=IGNORE_INDEX, reduction="sum")
                correct += (logits_nV.argmax(-1) == labels_n).sum()  # IGNORE_INDEX is no token
        masked += batch.masked
    student.train(was_training)
    return HeldoutLosses(float(loss) / max(1, masked), float(correct) / max(1, masked))
