"""One optimizer step: forward, loss and gradient over micro-batches and ranks, by counts.

Every part of the loss is a sum divided by its count over the whole step, so neither the number of micro-batches nor
the number of ranks changes the gradient.
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
    """Which rank this is, of how many, and the group that sums small counts on the CPU (no device sync)."""

    rank: int = 0
    ranks: int = 1
    counting: dist.ProcessGroup | None = None


class StudentWithLoss(nn.Module):
    """Student and loss as one module, so that DDP sees one forward. Returns this micro-batch's share of the step."""

    def __init__(self, student: PreTrainedModel, loss: LossSettings, compile_encoder: bool) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.hidden = torch.compile(hidden_rows, dynamic=False) if compile_encoder else hidden_rows

    def forward(self, batch: Batch, told: TeacherSignal, counts: RowCounts) -> Losses:
        """Runs the encoder on B blocks and the LM head on the B x M selected slots only."""
        hidden_ND = self.hidden(self.student, batch.input_ids, batch.attention_mask, batch.positions).flatten(0, 1)
        weight, bias = decoder_of(self.student)
        return fused_loss(
            head_features(self.student, hidden_ND),
            weight,
            bias,
            batch.labels.flatten(),
            weights=Weights(self.loss.distil, self.loss.cosine, self.loss.mlm),
            temperature=self.loss.temperature,
            counts=counts,
            teacher_logits=told.logits,
            student_hidden_ND=hidden_ND,
            teacher_hidden_ND=told.hidden,
            valid_N=batch.valid.flatten(),
            vocab_multiple=VOCABULARY_MULTIPLE if hidden_ND.is_cuda else 1,
        )


class StepCounts(NamedTuple):
    """Counts of one step over all ranks, and whether any rank was asked to stop."""

    rows: int
    masked: int
    tokens: int
    stop: bool


def sum_counts(batches: list[Batch], stop: bool, world: Ranks) -> StepCounts:
    """Adds the counts of all micro-batches of all ranks, before the first backward."""
    own = [sum(b.rows for b in batches), sum(b.masked for b in batches), sum(b.tokens for b in batches), int(stop)]
    total = torch.tensor(own)
    if world.ranks > 1:
        dist.all_reduce(total, group=world.counting)
    rows, masked, tokens, stops = total.tolist()
    return StepCounts(rows, masked, tokens, stop=stops > 0)


def gradient_step(
    distiller: nn.Module,
    supervision: SignalSource,
    batches: list[Batch],
    sums: StepCounts,
    world: Ranks,
    autocast: torch.dtype | None,
) -> Tensor:
    """Backward of one whole step; returns this rank's share of [total, distil, cosine, mlm] (add over ranks)."""
    counts = RowCounts(float(sums.rows), float(sums.masked))
    device = next(distiller.parameters()).device
    parts = torch.zeros(4, device=device)
    for number, batch in enumerate(batches):
        moved = batch.to(device)
        last = number == len(batches) - 1
        hold = distiller.no_sync() if isinstance(distiller, DistributedDataParallel) and not last else nullcontext()
        with hold:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                losses: Losses = distiller(moved, supervision.rows(moved), counts)
            # DDP averages over ranks; the counts are of all ranks already, so the sum is wanted.
            (losses.total * world.ranks).backward()  # type: ignore[no-untyped-call]
        parts += torch.stack([part.detach().float() for part in losses])
    return parts
