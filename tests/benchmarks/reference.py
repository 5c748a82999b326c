"""The step of the reference trainer (DistilBERT of Hugging Face, transformers-research-projects/distillation), plainly.

    losses = reference_step(teacher, student, optimizer, reference_batch(batch), Loss(), autocast=None)

Teacher in the loop, both models whole, logits of every attended row of both, copied out by masked_select, three
losses. Used by the benchmarks as what ours is compared with; tests/benchmarks/test_benchmarks.py checks that it
computes the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tasks.loader.batch import Batch
from tasks.recipe.config import LossSettings
from tasks.train.loss import IGNORE_INDEX, Losses

CLIP = 5.0


class ReferenceBatch(NamedTuple):
    """What the reference reads: input_ids, attention_mask and labels (-100: not masked), each [B, L]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def reference_batch(batch: Batch) -> ReferenceBatch:
    """The same blocks under the same masks as a batch of ours."""
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    if batch.positions is None:
        return ReferenceBatch(batch.input_ids, mask, batch.labels)
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    row, slot = batch.valid.nonzero(as_tuple=True)
    labels[row, batch.positions[row, slot]] = batch.labels[row, slot]
    return ReferenceBatch(batch.input_ids, mask, labels)


def reference_losses(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: ReferenceBatch, loss: LossSettings
) -> Losses:
    """Both forwards and the three losses over all attended rows."""
    told = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
    ours = student(**told)
    with torch.no_grad():
        theirs = teacher(**told)
    student_NV, teacher_NV = (_select(out.logits, batch.attention_mask) for out in (ours, theirs))
    distil = (
        F.kl_div(
            F.log_softmax(student_NV / loss.temperature, dim=-1),
            F.softmax(teacher_NV / loss.temperature, dim=-1),
            reduction="batchmean",
        )
        * loss.temperature**2
    )
    mlm = F.cross_entropy(ours.logits.view(-1, ours.logits.size(-1)), batch.labels.view(-1), ignore_index=IGNORE_INDEX)
    student_ND, teacher_ND = (_select(out.hidden_states[-1], batch.attention_mask) for out in (ours, theirs))
    cosine = F.cosine_embedding_loss(student_ND, teacher_ND, student_ND.new_ones(len(student_ND)))
    return Losses(loss.distil * distil + loss.cosine * cosine + loss.mlm * mlm, distil, cosine, mlm)


def reference_step(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: ReferenceBatch,
    loss: LossSettings,
    autocast: torch.dtype | None,
) -> Losses:
    """One optimizer step."""
    with torch.autocast(batch.input_ids.device.type, dtype=autocast, enabled=autocast is not None):
        losses = reference_losses(teacher, student, batch, loss)
    losses.total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def _select(x_BLX: Tensor, mask_BL: Tensor) -> Tensor:
    """Attended rows [N, X], the way the reference takes them."""
    return torch.masked_select(x_BLX, mask_BL[:, :, None].expand_as(x_BLX)).view(-1, x_BLX.size(-1))
