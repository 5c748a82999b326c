"""Case of parity: one step of the same weights and rows on the CPU in float32 and on the device in several precisions.

Covers masked and all positions, full and padded blocks, cached and live targets, eager and compiled. Figures are
relative differences of the loss parts and of the gradient; float32 should agree to rounding, bf16 to about 1 %.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.loader.batch import Batch
from tasks.models.student import make_student
from tasks.recipe.config import LossSettings, TargetSettings
from tasks.targets.codec import Codec
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import CachedTeacher, OnlineTeacher
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.synthetic import SMALL, TINY, Bench, cache_targets, first_batch, random_bench

PRECISIONS = {"float32": (None, False), "bf16": (torch.bfloat16, False), "bf16 compiled": (torch.bfloat16, True)}
"""Autocast dtype, and whether the encoder is compiled."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch, and the models that a step starts from."""

    bench: Bench
    student: PreTrainedModel
    batch: Batch
    codec: Codec
    online: bool

    def step(self, device: str, autocast: torch.dtype | None, compiled: bool) -> tuple[Tensor, Tensor]:
        """Loss parts [4] and flat gradient of one step, on the CPU."""
        student, model = copy.deepcopy(self.student), copy.deepcopy(self.bench.teacher.model)
        for copied in (student, model):
            nn.Module.to(copied, device)
        teacher = replace(self.bench.teacher, model=model, device=torch.device(device))
        loss = LossSettings()
        signals = OnlineTeacher(teacher, loss) if self.online else CachedTeacher(teacher, self.codec, loss)
        counts = sum_counts([self.batch], False, Ranks())
        module = StudentWithLoss(student, loss, compiled)
        losses = gradient_step(module, signals, [self.batch], counts, Ranks(), autocast)
        gradients = [parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None]
        return losses.cpu(), torch.cat(gradients).cpu()


def parity(context: Context) -> None:
    """Relative differences of losses and gradient, precision by precision."""
    bench = random_bench(context.work / "parity", TINY if context.tiny else SMALL, 32, "cpu")
    for positions in ("masked", "all"):
        targets = TargetSettings.model_validate({"positions": positions})
        parts, codec = cache_targets(bench, targets)
        batch = first_batch(bench, targets, parts, 8)
        student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers).train()
        for label, rows, online in (
            ("cached", batch, False),
            ("cache_targets padded", _padded(batch), False),
            ("online", batch, True),
        ):
            _compare(context, f"{positions} {label}", Problem(bench, student, rows, codec, online))


def _padded(batch: Batch) -> Batch:
    """The batch with the end of its last block not attended."""
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
    mask[-1, -mask.shape[1] // 8 :] = False
    return batch._replace(attention_mask=mask)


def _compare(context: Context, label: str, problem: Problem) -> None:
    expected, expected_gradient = problem.step("cpu", None, compiled=False)
    for name, (autocast, compiled) in PRECISIONS.items():
        if compiled and context.tiny:
            continue  # a C++ compiler takes a minute on a CPU and shows nothing about a GPU
        losses, gradient = problem.step(context.device, autocast, compiled)
        difference = {
            "loss": float((losses - expected).abs().max() / expected.abs().max()),
            "gradient": float((gradient - expected_gradient).norm() / expected_gradient.norm()),
        }
        context.record(f"{label}, {name}", difference)
