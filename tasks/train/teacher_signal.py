"""Defines the sources of the teacher signal: cached targets, an online teacher, or no teacher.

    signal = signal_source.signal(batch)          # TeacherSignal: logits per chunk of rows, hidden states [N, D]

Each source returns the teacher's last hidden states (for the cosine term) and logits (for the distil term) of the N
selected positions of a micro-batch. The logits come from the teacher's own LM head, so they are exact.
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
"""On a GPU, decoders are padded to a multiple of this number of rows, for efficient use of tensor cores."""


class TeacherSignal(NamedTuple):
    """The teacher's output on N rows: logits per chunk, hidden states [N, D]; None if the loss does not need them."""

    logits: ChunkLogits | None = None
    hidden: Tensor | None = None


class SignalSource(Protocol):
    """A source of teacher signals."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """Returns the signal of all N = B x M slots of the batch, in order, unused slots included."""
        ...


class NoTeacher:
    """An empty signal, for plain MLM training."""

    def signal(self, batch: Batch) -> TeacherSignal:
        return TeacherSignal()


class OnlineTeacher:
    """Runs the teacher on the batch that the student reads, and stores nothing."""

    def __init__(self, teacher: TeacherModel, loss: LossSettings) -> None:
        self.teacher, self.loss = teacher, loss

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        hidden_BMD = hidden_rows(self.teacher.model, batch.input_ids, batch.attention_mask, batch.positions)
        return signal_from_hidden(self.teacher, hidden_BMD.flatten(0, 1), self.loss)


class CachedTeacher:
    """Decodes cached targets on the device. Needs only the LM head of the teacher."""

    def __init__(self, teacher: TeacherModel, codec: Codec, loss: LossSettings) -> None:
        self.teacher, self.codec, self.loss = teacher, codec, loss

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        if batch.payload is None:
            raise FatalError("the batch has no cached targets; load it from a dataset with cached=True")
        payload = batch.payload.flatten(0, 1)
        if self.codec.name == "topk":
            kept: TopK = self.codec.decode_topk(payload)
            return TeacherSignal(logits=lambda start, stop: topk_logits(kept, start, stop, self.teacher.vocab_size))
        return signal_from_hidden(self.teacher, self.codec.decode(payload, self.teacher.dtype), self.loss)


def signal_from_hidden(teacher: TeacherModel, hidden_ND: Tensor, loss: LossSettings) -> TeacherSignal:
    """Returns the signal of N rows: their hidden states, and their logits if the distil term has a weight."""
    if loss.distil == 0:
        return TeacherSignal(hidden=hidden_ND)
    weight_VH, bias_V = decoder_of(teacher.model)
    multiple = VOCABULARY_MULTIPLE if hidden_ND.is_cuda else 1
    return TeacherSignal(
        decoder_logits(head_features(teacher.model, hidden_ND), weight_VH, bias_V, multiple), hidden_ND
    )
