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
from tasks.recipe.config import LossSettings
from tasks.targets.codec import Codec, TopK, topk_logits
from tasks.train.loss import ChunkLogits, decoder_logits

VOCABULARY_MULTIPLE = 64
"""Decoders are padded to this many rows on a GPU, for its tensor cores."""


class TeacherSignal(NamedTuple):
    """The teacher's word on N rows: logits by chunk, hidden states [N, D]; None where the loss does not ask."""

    logits: ChunkLogits | None = None
    hidden: Tensor | None = None


class SignalSource(Protocol):
    """A source of targets."""

    def rows(self, batch: Batch) -> TeacherSignal:
        """The teacher's word on every slot of the batch, B x M of them in order."""
        ...


class NoTeacher:
    """Plain MLM training."""

    def rows(self, batch: Batch) -> TeacherSignal:
        return TeacherSignal()


class OnlineTeacher:
    """The teacher runs on the same masked input, nothing is kept."""

    def __init__(self, teacher: TeacherModel, loss: LossSettings) -> None:
        self.teacher, self.loss = teacher, loss

    @torch.no_grad()
    def rows(self, batch: Batch) -> TeacherSignal:
        hidden = hidden_rows(self.teacher.model, batch.input_ids, batch.attention_mask, batch.positions)
        return signal_from_hidden(self.teacher, hidden.flatten(0, 1), self.loss)


class CachedTeacher:
    """Hidden states from the cache, decoded on the device, through the teacher's own LM head."""

    def __init__(self, teacher: TeacherModel, codec: Codec, loss: LossSettings) -> None:
        self.teacher, self.codec, self.loss = teacher, codec, loss

    @torch.no_grad()
    def rows(self, batch: Batch) -> TeacherSignal:
        if batch.payload is None:
            raise FatalError("the batch carries no cached targets; this run's manifest has none")
        payload = batch.payload.flatten(0, 1)
        if self.codec.name == "topk":
            kept: TopK = self.codec.decode_topk(payload)
            return TeacherSignal(logits=lambda start, stop: topk_logits(kept, start, stop, self.teacher.vocab_size))
        return signal_from_hidden(self.teacher, self.codec.decode(payload, self.teacher.dtype), self.loss)


def signal_from_hidden(teacher: TeacherModel, hidden_ND: Tensor, loss: LossSettings) -> TeacherSignal:
    """Logits (only if distil counts) and hidden states of N rows."""
    if loss.distil == 0:
        return TeacherSignal(hidden=hidden_ND)
    weight, bias = decoder_of(teacher.model)
    multiple = VOCABULARY_MULTIPLE if hidden_ND.is_cuda else 1
    return TeacherSignal(decoder_logits(head_features(teacher.model, hidden_ND), weight, bias, multiple), hidden_ND)
