"""A look at held-out blocks during training: masked cross-entropy and top-1. Called by tasks.train on rank 0."""

import numpy as np
import torch
from torch.nn import functional as F

from storage.store import Store
from tasks.batch import Masking, make_batch
from tasks.build import Built
from tasks.corpus import Corpus
from tasks.encoder import decoder_of, head_features, hidden_rows
from tasks.mask import IGNORED
from tasks.metrics import Heldout
from tasks.run import RunSpec

VARIANT = 1_000_000
"""Mask variant of the curve: no training epoch uses it, and it never changes, so looks compare."""


@torch.no_grad()
def heldout_loss(
    store: Store, run: RunSpec, built: Built, device: torch.device, autocast: torch.dtype | None
) -> Heldout:
    """Masked cross-entropy (nats a token) and top-1 over the first train.validate_rows held-out blocks."""
    corpus = Corpus(store, run.heldout, cached=False)
    masking = Masking(built.vocabulary, run.mask, every_position=False, counts=built.counts)
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
        loss += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        right += ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()
        masked += batch.masked
    built.student.train(was_training)
    return Heldout(float(loss) / max(1, masked), float(right) / max(1, masked))
