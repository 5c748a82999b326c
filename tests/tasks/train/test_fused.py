"""Training with the fused loss and with the plain loss gives the same loss terms over 200 steps in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.loader.batch import Batch, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.models.student import make_student
from tasks.recipe.config import LossSettings, TargetSettings, TrainSettings
from tasks.train.loss import Losses, Weights, combined_loss
from tasks.train.optimizer import make_optimizer
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import OnlineTeacher
from tests.benchmarks.results import CORPUS, TEACHER
from tests.benchmarks.synthetic import Bench, masking_rule, real_bench

STEPS = 200
ROWS = 8
LR = 5e-4
"""Learning rate of the DistilBERT code."""


def batches_of(bench: Bench) -> list[Batch]:
    """The blocks of the demo corpus in order, masked."""
    dataset, masking = BlockDataset(bench.store, bench.parts, cached=False), masking_rule(bench, TargetSettings())
    zeros = np.zeros(ROWS, np.int64)
    rows = [np.arange(step * ROWS, (step + 1) * ROWS) for step in range(STEPS)]
    return [make_batch(dataset, masking, zeros, chosen % bench.parts[0].rows, zeros) for chosen in rows]


def plain_losses(bench: Bench, student: Any, batch: Batch) -> Losses:
    """Full logits of student and teacher on the selected rows, and autograd for everything."""
    valid_N = batch.valid.flatten()

    def rows(model: Any) -> tuple[Tensor, Tensor]:
        hidden_ND = hidden_rows(model, batch.input_ids, batch.attention_mask, batch.positions).flatten(0, 1)[valid_N]
        return F.linear(head_features(model, hidden_ND), *decoder_of(model)), hidden_ND

    student_NV, student_ND = rows(student)
    with torch.no_grad():
        teacher_NV, teacher_ND = rows(bench.teacher.model)
    loss = LossSettings()
    weights = Weights(loss.distil, loss.cosine, loss.mlm)
    labels_N = batch.labels.flatten()[valid_N]
    return combined_loss(student_NV, teacher_NV, student_ND, teacher_ND, labels_N, weights, loss.temperature)


def trained(bench: Bench, batches: list[Batch], fused: bool) -> Tensor:
    """Losses [steps, 4] of a student trained from the same start."""
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers).train()
    optimizer = make_optimizer(student, TrainSettings(lr=LR))
    student_with_loss, signal_source = (
        StudentWithLoss(student, LossSettings(), compile_encoder=False),
        OnlineTeacher(bench.teacher, LossSettings()),
    )
    step_losses = []
    for batch in batches:
        if fused:
            losses = gradient_step(
                student_with_loss, signal_source, [batch], sum_counts([batch], False, Ranks()), Ranks(), None
            )
        else:
            plain = plain_losses(bench, student, batch)
            plain.total.backward()  # type: ignore[no-untyped-call]
            losses = torch.stack([loss.detach() for loss in plain])
        nn.utils.clip_grad_norm_(student.parameters(), TrainSettings().clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_losses.append(losses)
    return torch.stack(step_losses)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_fused_and_plain_loss_agree_over_200_steps(tmp_path: Path) -> None:
    bench = real_bench(tmp_path, TEACHER, CORPUS, length=64, layers=2)
    batches = batches_of(bench)
    fused, plain = trained(bench, batches, fused=True), trained(bench, batches, fused=False)
    assert not torch.equal(fused, plain)
    assert (fused[-20:].mean(0) < fused[:20].mean(0)).all(), "the loss did not fall, so the comparison says nothing"
    difference = ((fused - plain).abs() / plain).amax(0).tolist()
    print(
        "\nlargest relative difference: "
        + ", ".join(f"{n} {x:.1e}" for n, x in zip(Losses._fields, difference, strict=True))
    )
    assert max(difference) <= 1e-4
