"""metrics.jsonl: one line every few steps, on local disk, written by rank 0 of a training and followed by the flow.

A line holds means over the steps since the last one: loss and its parts, learning rate, gradient norm, tokens a
second, share of the time spent waiting for data, and on a GPU model FLOP utilisation. Held-out figures have lines of
their own. On resume the file is cut back to the checkpoint's step, so that no step stands in it twice; each checkpoint
ends a line, so that none is missing.
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

from storage.disk import writing
from storage.store import Store
from tasks.loader.batch import MaskingRule, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.recipe.run_spec import METRICS, RunSpec
from tasks.tokens.mask import IGNORE_INDEX
from tasks.train.checkpoint import TrainingProgress
from tasks.train.flops import Work
from tasks.train.setup import TrainingSetup
from tasks.train.step import StepCounts

PARTS = ("loss", "distil", "cosine", "mlm")


class HeldoutLosses(NamedTuple):
    """Masked cross-entropy (nats a token) and top-1 accuracy on held-out blocks."""

    loss: float
    top1: float


class MetricsWriter:
    """Collects steps and appends lines. Tensors stay on their device until a line is due.

    `work` and `rate`: what a token and a position cost, and the FLOP a second of all ranks; without, no `mfu`.
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
        """Drops lines after `step`, and a last line that a kill has cut short. FatalError: the disk is full."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        fresh = self.path.with_suffix(".new")
        with self._writing():
            fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(fresh, self.path)  # a kill at this moment must not cost the curve so far
        self._since = time.perf_counter()

    def add(
        self,
        progress: TrainingProgress,
        parts: Tensor,
        norm: Tensor,
        lr: float,
        sums: StepCounts,
        waited: float,
        *,
        due: bool,
    ) -> None:
        """Takes one step in; writes a line when one is `due`. `waited`: seconds waited for data since the start."""
        self._pending.append((parts, norm.detach()))
        self._tokens += sums.tokens
        self._rows += sums.rows
        if not due:
            return
        seconds = time.perf_counter() - self._since
        means = torch.stack([step_parts for step_parts, _ in self._pending]).mean(0).tolist()
        self._append(
            {
                "step": progress.step,
                **dict(zip(PARTS, means, strict=True)),
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

    def validated(self, step: int, found: HeldoutLosses) -> None:
        """Takes a look at held-out blocks in, right after a line; its time is not training time."""
        line = {"step": step, "heldout_loss": found.loss, "heldout_top1": found.top1, "time": time.time()}
        self._append(line)
        self._since = time.perf_counter()

    def _mfu(self, seconds: float) -> dict[str, float]:
        """`mfu` of the steps since the last line, where it is known what it is measured against."""
        if self.work is None or not self.rate:
            return {}
        return {"mfu": self.work.of(self._tokens, self._rows) / seconds / self.rate}

    def _append(self, line: dict[str, Any]) -> None:
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"the run's folder {self.path.parent}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a line that is being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


VARIANT = 1_000_000
"""Mask variant of the curve: no training epoch uses it, and it never changes, so looks compare."""


@torch.no_grad()
def heldout_loss(
    store: Store, run: RunSpec, built: TrainingSetup, device: torch.device, autocast: torch.dtype | None
) -> HeldoutLosses:
    """Masked cross-entropy (nats a token) and top-1 over the first train.validate_rows held-out blocks."""
    corpus = BlockDataset(store, run.heldout, cached=False)
    masking = MaskingRule(built.vocabulary, run.mask, every_position=False, counts=built.counts)
    parts = np.concatenate([np.full(part.rows, n, np.int64) for n, part in enumerate(run.heldout)])
    rows = np.concatenate([np.arange(part.rows, dtype=np.int64) for part in run.heldout])
    parts, rows = parts[: run.train.validate_rows], rows[: run.train.validate_rows]
    size = run.train.micro_rows or min(run.train.batch_rows, 32)
    was_training = built.student.training
    built.student.train(False)
    loss, right, masked = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for at in range(0, len(rows), size):
        chosen = slice(at, at + size)
        variants = np.full(len(rows[chosen]), VARIANT, np.int64)
        batch = make_batch(corpus, masking, parts[chosen], rows[chosen], variants).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden = hidden_rows(built.student, batch.input_ids, batch.attention_mask, batch.positions)
            weight, bias = decoder_of(built.student)
            logits = F.linear(head_features(built.student, hidden.flatten(0, 1)), weight, bias).float()
        labels = batch.labels.flatten()
        loss += F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        right += ((logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)).sum()
        masked += batch.masked
    built.student.train(was_training)
    return HeldoutLosses(float(loss) / max(1, masked), float(right) / max(1, masked))
