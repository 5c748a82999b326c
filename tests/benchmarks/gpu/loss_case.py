"""Case of the LM head and its loss: as the trainer runs it, in other chunk sizes, compiled, and with the fused kernel.

Rows and vocabulary are those of a step of 256 blocks of 512 tokens with masked positions. The variants replace private
functions of tasks.train.loss, which the trainer itself leaves as they are.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tasks.tokens.mask import IGNORE_INDEX
from tasks.train import loss as training_loss
from tasks.train.loss import RowCounts, Weights, decoder_logits, fused_loss
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.timing import median_seconds

WEIGHTS = Weights(0.5, 0.0, 0.2)
TEMPERATURE = 2.0
VOCAB_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Head:
    """Inputs of the loss of one step: N rows, V vocabulary, H features of student and teacher."""

    features: Tensor
    """[N, H], as `teacher_features`."""
    weight: Tensor
    """[V, H], as `teacher_weight`."""
    bias: Tensor
    """[V], as `teacher_bias`."""
    labels: Tensor
    """[N]."""
    teacher_features: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor

    def loss_and_gradients(self, chunk_rows: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Total and gradients of features, weight and bias, under bf16 autocast."""
        rows = len(self.labels)
        inputs = (self.features, self.weight, self.bias)
        teacher = (self.teacher_features, self.teacher_weight, self.teacher_bias)
        with torch.autocast(self.features.device.type, dtype=torch.bfloat16):
            losses = fused_loss(
                *inputs,
                self.labels,
                weights=WEIGHTS,
                temperature=TEMPERATURE,
                counts=RowCounts(float(rows), float(rows)),
                teacher_logits=decoder_logits(*teacher, VOCAB_MULTIPLE),
                valid_N=torch.ones(rows, dtype=torch.bool, device=self.labels.device),
                chunk_rows=chunk_rows,
                vocab_multiple=VOCAB_MULTIPLE,
            )
        return losses.total.detach(), torch.autograd.grad(losses.total, inputs)


def random_head(context: Context) -> Head:
    """Random rows and decoders on the device."""
    rows, vocabulary, width = (40, 300, 16) if context.tiny else (19_712, 32_005, 768)
    features, teacher_features = (torch.randn(rows, width, device=context.device) for _ in range(2))
    weight = torch.randn(vocabulary, width, device=context.device) * 0.02
    bias = torch.zeros(vocabulary, device=context.device)
    return Head(
        features.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        torch.randint(0, vocabulary, (rows,), device=context.device),
        teacher_features.bfloat16(),
        weight.detach().bfloat16() * 1.1,
        bias.detach().bfloat16(),
    )


def loss(context: Context) -> None:
    """Milliseconds, peak memory, loss and gradient norms of every variant."""
    torch.manual_seed(0)
    head = random_head(context)
    _measure(context, "as trained", head)
    for rows in (8,) if context.tiny else (512, 1024, 4096, 8192):
        _measure(context, f"chunks of {rows} rows", head, rows)
    if not context.tiny:
        compiled = torch.compile(training_loss._chunk_loss, dynamic=False)
        with patch.object(training_loss, "_chunk_loss", compiled):
            _measure(context, "compiled chunk", head)
    _measure_kernel(context, head)


def _measure_kernel(context: Context, head: Head) -> None:
    chunk_loss = _kernel_chunk_loss(context)
    if chunk_loss is None:
        context.record("fused kernel", "skipped: no triton")
        return
    for dtype in (torch.float32, torch.bfloat16):
        context.record(f"fused kernel, {dtype}, relative difference", _differences(context, chunk_loss, dtype))
    with patch.object(training_loss, "_chunk_loss", chunk_loss):
        _measure(context, "fused kernel, float32 logits", head)
        # bf16 logits: the chunk keeps the dtype of the products, and sums in the kernel stay float32. The weight
        # gradient is then summed in bf16 too.
        with patch.object(training_loss, "_sum_dtype", lambda dtype: dtype):
            for rows in () if context.tiny else (None, 8192):
                _measure(context, f"fused kernel, bf16 logits, {rows or 'usual'} rows per chunk", head, rows)


def _kernel_chunk_loss(context: Context) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """The fused kernel in the form of `_chunk_loss`; None where triton is not installed."""
    if context.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported
    try:
        from tests.benchmarks.gpu.kernel import fused_kl_cross_entropy
    except ModuleNotFoundError:
        return None

    def chunk_loss(
        student_nV: Tensor, teacher_nV: Tensor, labels_n: Tensor, valid_n: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        factors = (plan.distil_factor, plan.mlm_factor, plan.temperature)
        kl_n, entropy_n = fused_kl_cross_entropy(student_nV, teacher_nV, labels_n, valid_n, *factors)
        return kl_n.sum(), entropy_n.sum(), student_nV

    return chunk_loss


def _differences(context: Context, chunk_loss: Callable[..., Any], dtype: torch.dtype) -> dict[str, float]:
    """Relative differences of the kernel to `_chunk_loss` in float32, with an unmasked and an invalid row."""
    rows, vocabulary = (7, 1003) if context.tiny else (512, 32_064)
    student_nV, teacher_nV = ((3 * torch.randn(rows, vocabulary, device=context.device)).to(dtype) for _ in range(2))
    labels_n = torch.randint(0, vocabulary, (rows,), device=context.device)
    labels_n[1] = IGNORE_INDEX
    valid_n = torch.ones(rows, dtype=torch.bool, device=context.device)
    valid_n[2] = False
    distil, mlm = (torch.tensor(factor / rows, device=context.device) for factor in (0.5 * TEMPERATURE**2, 0.2))
    plan = training_loss._ChunkPlan(
        distil_factor=distil,
        mlm_factor=mlm,
        temperature=TEMPERATURE,
        chunk_rows=rows,
        vocab_multiple=1,
        needs_gradient=True,
    )
    expected = training_loss._chunk_loss(student_nV.float(), teacher_nV.float(), labels_n, valid_n, plan)
    found = chunk_loss(student_nV.clone(), teacher_nV, labels_n, valid_n, plan)
    names = ("kl", "cross_entropy", "gradient")
    return {
        name: float((ours.float() - theirs).norm() / theirs.norm())
        for name, ours, theirs in zip(names, found, expected, strict=True)
    }


def _measure(context: Context, name: str, head: Head, chunk_rows: int | None = None) -> None:
    """Records one variant; one that fails is recorded with its error, and the next is measured."""
    try:
        if not context.tiny:
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(lambda: head.loss_and_gradients(chunk_rows), context.device, repeats=5, warm_up=2)
        total, gradients = head.loss_and_gradients(chunk_rows)
    except RuntimeError as error:  # out of memory, or a failure to compile
        context.record(name, f"failed: {type(error).__name__}: {str(error)[:300]}")
        return
    figures = {"ms": 1e3 * seconds, "loss": float(total), "gradient_norms": [float(one.norm()) for one in gradients]}
    if not context.tiny:
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    context.record(name, figures)
