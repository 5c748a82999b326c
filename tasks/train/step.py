"""Computes the loss and the gradient of one optimizer step over its micro-batches and ranks.

    step_counts = sum_counts(batches, stop.requested, ranks)
    losses = gradient_step(student_with_loss, signal_source, batches, step_counts, ranks, torch.bfloat16)

Every loss term is a sum divided by its count over the whole step, so neither the number of micro-batches nor the number
of ranks changes the gradient.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from tasks.loader.batch import Batch
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.recipe.config import LossSettings
from tasks.train.loss import Losses, RowCounts, Weights, fused_loss
from tasks.train.teacher_signal import VOCABULARY_MULTIPLE, SignalSource, TeacherSignal


class Ranks(NamedTuple):
    """This rank, the number of ranks, and the process group for small counts.

    `cpu_group`: gloo group that sums counts on the CPU without a device sync; None if the default group is already
    gloo, or if this is the only rank.
    """

    rank: int = 0
    world_size: int = 1
    cpu_group: dist.ProcessGroup | None = None


class StudentWithLoss(nn.Module):
    """Student and loss as one module, so that DDP runs one forward pass."""

    def __init__(self, student: PreTrainedModel, loss: LossSettings, compile_encoder: bool) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.hidden_rows = torch.compile(hidden_rows, dynamic=False) if compile_encoder else hidden_rows

    def forward(self, batch: Batch, signal: TeacherSignal, counts: RowCounts) -> Losses:
        """Returns the micro-batch's share of the loss of the step.

        The encoder runs on all B blocks, the LM head on the N = B x M selected positions only. `counts` are the counts
        of the complete step.
        """
        hidden_BMD = self.hidden_rows(self.student, batch.input_ids, batch.attention_mask, batch.positions)
        hidden_ND = hidden_BMD.flatten(0, 1)
        weight_VH, bias_V = decoder_of(self.student)
        return fused_loss(
            head_features(self.student, hidden_ND),
            weight_VH,
            bias_V,
            batch.labels.flatten(),
            weights=Weights(self.loss.distil, self.loss.cosine, self.loss.mlm),
            temperature=self.loss.temperature,
            counts=counts,
            teacher_logits=signal.logits,
            student_hidden_ND=hidden_ND,
            teacher_hidden_ND=signal.hidden,
            valid_N=batch.valid.flatten(),
            vocab_multiple=VOCABULARY_MULTIPLE if hidden_ND.is_cuda else 1,
        )


class StepCounts(NamedTuple):
    """Counts of one step over all ranks (see Batch), and whether any rank received a stop signal."""

    selected: int
    masked: int
    tokens: int
    stop: bool


def sum_counts(batches: list[Batch], stop: bool, ranks: Ranks) -> StepCounts:
    """Adds up the counts of all micro-batches of all ranks; called before the first backward pass."""
    own = [sum(b.selected for b in batches), sum(b.masked for b in batches), sum(b.tokens for b in batches), int(stop)]
    total = torch.tensor(own)
    if ranks.world_size > 1:
        dist.all_reduce(total, group=ranks.cpu_group)
    selected, masked, tokens, stops = total.tolist()
    return StepCounts(selected, masked, tokens, stop=stops > 0)


def gradient_step(
    student_with_loss: nn.Module,
    signal_source: SignalSource,
    batches: list[Batch],
    step_counts: StepCounts,
    ranks: Ranks,
    autocast: torch.dtype | None,
) -> Tensor:
    """Accumulates the gradient of one step.

    Returns this rank's share of [total, distil, cosine, mlm]; the sum over ranks is the loss of the step. `autocast`:
    dtype of the matrix products, None for float32.
    """
    counts = RowCounts(float(step_counts.selected), float(step_counts.masked))
    device = next(student_with_loss.parameters()).device
    step_losses = torch.zeros(4, device=device)
    for number, cpu_batch in enumerate(batches):
        batch = cpu_batch.to(device)
        is_last = number == len(batches) - 1
        ddp = student_with_loss if isinstance(student_with_loss, DistributedDataParallel) else None
        with ddp.no_sync() if ddp is not None and not is_last else nullcontext():
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                losses: Losses = student_with_loss(batch, signal_source.signal(batch), counts)
            # DDP averages gradients over ranks. The counts are already those of all ranks, so gradients must be summed.
            (losses.total * ranks.world_size).backward()  # type: ignore[no-untyped-call]
        step_losses += torch.stack([loss.detach().float() for loss in losses])
    return step_losses
