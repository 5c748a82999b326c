"""What the student is told: one interface over cached targets, a teacher in the loop, and no teacher at all.

Each source gives, for the N selected rows of a micro-batch, the teacher's last hidden states (for the cosine part) and
its logits chunk by chunk (for the distil part). Both come from the teacher's own LM head, so they are exact.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from storage.errors import FatalError
from tasks.loader.batch import Batch
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.models.teacher import TeacherModel
from tasks.recipe.config import Loss
from tasks.targets.codec import Codec, TopK, spread
from tasks.train.loss import ChunkLogits, decoder_logits

VOCABULARY_MULTIPLE = 64
"""Decoders are padded to this many rows on a GPU, for its tensor cores."""


class Told(NamedTuple):
    """The teacher's word on N rows: logits by chunk, hidden states [N, D]; None where the loss does not ask."""

    logits: ChunkLogits | None = None
    hidden: Tensor | None = None


class Supervision(Protocol):
    """A source of targets."""

    def rows(self, batch: Batch) -> Told:
        """The teacher's word on every slot of the batch, B x M of them in order."""
        ...


class Nothing:
    """Plain MLM training."""

    def rows(self, batch: Batch) -> Told:
        return Told()


class Online:
    """The teacher runs on the same masked input, nothing is kept."""

    def __init__(self, teacher: TeacherModel, loss: Loss) -> None:
        self.teacher, self.loss = teacher, loss

    @torch.no_grad()
    def rows(self, batch: Batch) -> Told:
        hidden = hidden_rows(self.teacher.model, batch.input_ids, batch.attention_mask, batch.positions)
        return through_head(self.teacher, hidden.flatten(0, 1), self.loss)


class Cached:
    """Hidden states from the cache, decoded on the device, through the teacher's own LM head."""

    def __init__(self, teacher: TeacherModel, codec: Codec, loss: Loss) -> None:
        self.teacher, self.codec, self.loss = teacher, codec, loss

    @torch.no_grad()
    def rows(self, batch: Batch) -> Told:
        if batch.payload is None:
            raise FatalError("the batch carries no cached targets; this run's manifest has none")
        payload = batch.payload.flatten(0, 1)
        if self.codec.name == "topk":
            kept: TopK = self.codec.decode_topk(payload)
            return Told(logits=lambda start, stop: spread(kept, start, stop, self.teacher.vocab_size))
        return through_head(self.teacher, self.codec.decode(payload, self.teacher.dtype), self.loss)


def through_head(teacher: TeacherModel, hidden_ND: Tensor, loss: Loss) -> Told:
    """Logits (only if distil counts) and hidden states of N rows."""
    if loss.distil == 0:
        return Told(hidden=hidden_ND)
    weight, bias = decoder_of(teacher.model)
    multiple = VOCABULARY_MULTIPLE if hidden_ND.is_cuda else 1
    return Told(decoder_logits(head_features(teacher.model, hidden_ND), weight, bias, multiple), hidden_ND)
