"""The reference's train step: DistilBERT's trainer by Hugging Face (transformers-research-projects/distillation).

    losses = reference_step(teacher, student, optimizer, reference_batch(batch), LossSettings(), autocast=None)

Runs the teacher in the loop and both complete models, copies the logits of every attended row out by masked_select and
computes the three losses. The benchmarks compare our step with it; tests/benchmarks/test_benchmarks.py checks that both
compute the same loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tasks.loader.batch import Batch
from tasks.recipe.config import LossSettings
from tasks.tokens.mask import IGNORE_INDEX
from tasks.train.loss import Losses

CLIP = 5.0


class ReferenceBatch(NamedTuple):
    """Inputs of the reference: input_ids, attention_mask and labels (-100: not masked), each [B, L]."""

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
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
    student_output = student(**inputs)
    with torch.no_grad():
        teacher_output = teacher(**inputs)
    student_NV, teacher_NV = (_select(out.logits, batch.attention_mask) for out in (student_output, teacher_output))
    distil = (
        F.kl_div(
            F.log_softmax(student_NV / loss.temperature, dim=-1),
            F.softmax(teacher_NV / loss.temperature, dim=-1),
            reduction="batchmean",
        )
        * loss.temperature**2
    )
    mlm = F.cross_entropy(student_output.logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    student_ND, teacher_ND = (
        _select(out.hidden_states[-1], batch.attention_mask) for out in (student_output, teacher_output)
    )
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
    """Attended rows [N, X], selected as in the reference."""
    return torch.masked_select(x_BLX, mask_BL[:, :, None].expand_as(x_BLX)).view(-1, x_BLX.size(-1))
