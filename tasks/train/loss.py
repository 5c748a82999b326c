"""The distillation loss: from logits and hidden states of student and teacher to one number and its parts.

    distil  T^2 x mean over the selected rows of KL(teacher || student) at temperature T
    cosine  mean over the selected rows of 1 - cos(student hidden, teacher hidden)
    mlm     mean over the masked rows of the cross-entropy with the true token

These are the semantics of the DistilBERT code of Hugging Face (transformers-research-projects, distillation).
`combined_loss` says them plainly on full logits; `fused_loss` is what tasks.train calls: the same numbers from head
features, in chunks of rows, with the gradients computed on the way, so that no [N, V] tensor outlives its chunk.

Shapes: N rows (selected positions), V vocabulary, H head features, D hidden size, n rows of one chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Label of a row that carries no cross-entropy (the convention of torch and Hugging Face)."""

PADDED_BIAS = -1e4
"""Bias of a decoder row that stands for no token. Not -inf: 0 x inf in the KL is NaN."""

ChunkLogits = Callable[[int, int], Tensor]
"""Gives the teacher's logits [n, V] of rows start to stop. All rows finite, also where a row does not count."""


class Weights(NamedTuple):
    """How much each part counts in the total."""

    distil: float
    cosine: float
    mlm: float


class Losses(NamedTuple):
    """The total and its unweighted parts, tensors without dimensions."""

    total: Tensor
    distil: Tensor
    cosine: Tensor
    mlm: Tensor


class RowCounts(NamedTuple):
    """What the sums are divided by: the rows of the whole step, over all its micro-batches and ranks."""

    rows: float | Tensor
    masked: float | Tensor


def count_rows(labels_N: Tensor, valid_N: Tensor | None = None) -> RowCounts:
    """Selected and masked rows of one micro-batch, as tensors on its device; add them up over the step."""
    masked_N = labels_N != IGNORE_INDEX
    if valid_N is None:
        return RowCounts(torch.full((), labels_N.numel(), device=labels_N.device), masked_N.sum())
    return RowCounts(valid_N.sum(), (masked_N & valid_N).sum())


def combined_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    weights: Weights,
    temperature: float,
) -> Losses:
    """The loss on full logits: [N, V], [N, V], [N, D], [N, D] and labels [N] (-100: not masked).

    Every row given is a selected row. A part with weight 0 is still reported but never enters the total.
    """
    dtype = _sum_dtype(student_logits.dtype)
    student_NV, teacher_NV = student_logits.to(dtype), teacher_logits.to(dtype)
    log_q_NV = F.log_softmax(student_NV / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
    rows, masked = max(labels.numel(), 1), (labels != IGNORE_INDEX).sum().clamp(min=1)
    distil = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) * temperature**2 / rows
    cosine = _cosine_sum(student_hidden, teacher_hidden, None) / rows
    mlm = F.cross_entropy(student_NV, labels, reduction="sum", ignore_index=IGNORE_INDEX) / masked
    total = torch.zeros((), dtype=dtype, device=labels.device)
    for weight, part in zip(weights, (distil, cosine, mlm), strict=True):
        if weight:
            total = total + weight * part
    return Losses(total, distil, cosine, mlm)


def fused_loss(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    labels_N: Tensor,
    *,
    weights: Weights,
    temperature: float,
    counts: RowCounts,
    teacher_logits: ChunkLogits | None = None,
    student_hidden_ND: Tensor | None = None,
    teacher_hidden_ND: Tensor | None = None,
    valid_N: Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_multiple: int = 1,
) -> Losses:
    """The loss of one micro-batch, as its share of the whole step: each part is a sum over its rows / `counts`.

    So the losses of all micro-batches and ranks add up to the loss of the step, and their gradients to its gradient.

    `features_NH`, `weight_VH`, `bias_V`: what the student's LM head gives to its decoder, and the decoder.
    `teacher_logits`: see `decoder_logits`; not called, and may be None, when the weight of distil is 0.
    `student_hidden_ND`, `teacher_hidden_ND`: may be None when the weight of cosine is 0.
    `valid_N`: False for slots that only fill up a static shape; whatever they hold, they add exactly nothing.
    `chunk_rows`: rows in one chunk; None chooses by device and vocabulary.
    `vocab_multiple`: computes with the decoder padded to a multiple of this, for tensor cores.

    Only `total` carries a gradient, to features, weight, bias and student hidden; it can be used once. A part whose
    weight is 0 is not computed and reads 0. GEMMs run in the autocast dtype, else in that of the features; softmax
    and sums in float32, or in float64 when the features are float64. No call here waits for the device.
    ValueError when a part has weight but not its teacher input, or for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if weights.distil and teacher_logits is None:
        raise ValueError("the distil part needs teacher_logits")
    if weights.cosine and (student_hidden_ND is None or teacher_hidden_ND is None):
        raise ValueError("the cosine part needs student_hidden_ND and teacher_hidden_ND")
    dtype = _sum_dtype(features_NH.dtype)
    per_row, per_masked = (_inverse(count, dtype, labels_N.device) for count in counts)
    total = distil = cosine = mlm = torch.zeros((), dtype=dtype, device=labels_N.device)
    if weights.distil or weights.mlm:
        rows = _RowTensors(labels_N, valid_N, teacher_logits if weights.distil else None)
        plan = _ChunkPlan(
            distil=weights.distil * temperature**2 * per_row if weights.distil else None,
            mlm=weights.mlm * per_masked if weights.mlm else None,
            temperature=temperature,
            chunk_rows=chunk_rows or _rows_in_chunk(weight_VH),
            vocab_multiple=vocab_multiple,
            learn=torch.is_grad_enabled() and any(x.requires_grad for x in (features_NH, weight_VH, bias_V)),
        )
        total, distil_sum, mlm_sum = _decoder_loss(features_NH, weight_VH, bias_V, rows, plan)
        distil, mlm = distil_sum * temperature**2 * per_row, mlm_sum * per_masked
    if weights.cosine and student_hidden_ND is not None and teacher_hidden_ND is not None:
        # Only [N, D]: ordinary autograd is good enough.
        cosine_sum = _cosine_sum(student_hidden_ND, teacher_hidden_ND, valid_N)
        total = total + weights.cosine * per_row * cosine_sum
        cosine = cosine_sum.detach() * per_row
    return Losses(total, distil, cosine, mlm)


def decoder_logits(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, vocab_multiple: int = 1) -> ChunkLogits:
    """The teacher's logits, chunk by chunk, from its head features and its decoder (see tasks.encoder)."""
    dtype = _gemm_dtype(features_NH)
    features_NH = features_NH.to(dtype)
    weight_VH, bias_V = pad_decoder(weight_VH.to(dtype), bias_V.to(dtype), vocab_multiple)

    def chunk(start: int, stop: int) -> Tensor:
        return torch.addmm(bias_V, features_NH[start:stop], weight_VH.t())

    return chunk


def pad_decoder(weight_VH: Tensor, bias_V: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Decoder with zero rows of bias -1e4 added up to a multiple; their probability is 0 in float32."""
    extra = -weight_VH.shape[0] % multiple
    if not extra:
        return weight_VH, bias_V
    return F.pad(weight_VH, (0, 0, 0, extra)), F.pad(bias_V, (0, extra), value=PADDED_BIAS)


class _RowTensors(NamedTuple):
    """What the rows are compared with."""

    labels: Tensor
    valid: Tensor | None
    teacher_logits: ChunkLogits | None


class _ChunkPlan(NamedTuple):
    """How to compute: the factors of both sums in the total (None: not wanted), sizes, and if gradients are wanted."""

    distil: Tensor | None
    mlm: Tensor | None
    temperature: float
    chunk_rows: int
    vocab_multiple: int
    learn: bool


class _CarryGradient(torch.autograd.Function):
    """Gives a value that was computed outside autograd the gradients that were computed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        """`inputs_and_gradients`: features, weight, bias, then one gradient for each."""
        ctx.save_for_backward(*inputs_and_gradients[3:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times the one from outside."""
        features_NH, weight_VH, bias_V = ctx.saved_tensors
        return (None, features_NH * outer, weight_VH * outer, bias_V * outer, None, None, None)


def _decoder_loss(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, rows: _RowTensors, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted total (with gradient), sum of KL and sum of cross-entropies, over all chunks."""
    inputs = (features_NH, weight_VH, bias_V)
    dtype = _gemm_dtype(features_NH)
    with torch.no_grad(), torch.autocast(features_NH.device.type, enabled=False):
        distil_sum, mlm_sum, gradients = _walk_chunks(
            features_NH.to(dtype), weight_VH.to(dtype), bias_V.to(dtype), rows, plan
        )
        total = torch.zeros_like(distil_sum)
        if plan.distil is not None:
            total = total + plan.distil * distil_sum
        if plan.mlm is not None:
            total = total + plan.mlm * mlm_sum
    if plan.learn:
        typed = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)]
        total = _CarryGradient.apply(total, *inputs, *typed)  # type: ignore[no-untyped-call]
    return total, distil_sum, mlm_sum


def _walk_chunks(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, rows: _RowTensors, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Sum of KL, sum of cross-entropies and, if wanted, the gradients of the total to features, weight and bias."""
    vocabulary, dtype = weight_VH.shape[0], _sum_dtype(features_NH.dtype)
    weight_VH, bias_V = pad_decoder(weight_VH, bias_V, plan.vocab_multiple)
    if rows.valid is not None:  # 0 x NaN is NaN: rubbish in slots that do not count must not reach a GEMM
        features_NH = features_NH.masked_fill(~rows.valid[:, None], 0)
    distil_sum = mlm_sum = torch.zeros((), dtype=dtype, device=features_NH.device)
    if plan.learn:
        grad_features = torch.empty_like(features_NH)
        grad_weight = torch.zeros_like(weight_VH, dtype=dtype)
        grad_bias = torch.zeros_like(bias_V, dtype=dtype)
    for start in range(0, features_NH.shape[0], plan.chunk_rows):
        chunk = slice(start, min(start + plan.chunk_rows, features_NH.shape[0]))
        features_nH = features_NH[chunk]
        student_nV = torch.addmm(bias_V, features_nH, weight_VH.t()).to(dtype)
        teacher_nV = None
        if rows.teacher_logits is not None:
            teacher_nV = rows.teacher_logits(chunk.start, chunk.stop).to(dtype)
            if teacher_nV.shape[1] < student_nV.shape[1]:
                teacher_nV = F.pad(teacher_nV, (0, student_nV.shape[1] - teacher_nV.shape[1]), value=PADDED_BIAS)
        valid_n = None if rows.valid is None else rows.valid[chunk]
        kl, entropy, grad_nV = _chunk_loss(student_nV, teacher_nV, rows.labels[chunk], valid_n, plan)
        distil_sum, mlm_sum = distil_sum + kl, mlm_sum + entropy
        if plan.learn:
            grad_bias += grad_nV.sum(0)
            grad_nV = grad_nV.to(features_nH.dtype)
            grad_features[chunk] = torch.mm(grad_nV, weight_VH)
            if grad_nV.dtype == dtype:
                grad_weight.addmm_(grad_nV.t(), features_nH)
            else:
                grad_weight += torch.mm(grad_nV.t(), features_nH)
    gradients = (grad_features, grad_weight[:vocabulary], grad_bias[:vocabulary]) if plan.learn else ()
    return distil_sum, mlm_sum, gradients


def _chunk_loss(
    student_nV: Tensor, teacher_nV: Tensor | None, labels_n: Tensor, valid_n: Tensor | None, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of KL, sum of cross-entropies and (if it is to learn) the gradient [n, V] of the total to the logits."""
    kl = entropy = torch.zeros((), dtype=student_nV.dtype, device=student_nV.device)
    grad_nV = torch.zeros_like(kl)
    if teacher_nV is not None and plan.distil is not None:
        log_p_nV = F.log_softmax(teacher_nV / plan.temperature, dim=-1)
        log_q_nV = F.log_softmax(student_nV / plan.temperature, dim=-1)
        p_nV = log_p_nV.exp()
        kl_n = (log_p_nV.sub_(log_q_nV).mul_(p_nV)).sum(-1)
        kl = (kl_n if valid_n is None else kl_n.masked_fill(~valid_n, 0)).sum()
        if plan.learn:
            grad_nV = log_q_nV.exp_().sub_(p_nV).mul_(plan.distil / plan.temperature)
            if valid_n is not None:
                grad_nV.masked_fill_(~valid_n[:, None], 0)
    if plan.mlm is not None:
        masked_n = labels_n != IGNORE_INDEX
        if valid_n is not None:
            masked_n = masked_n & valid_n
        index_n1, scale_n1 = labels_n.clamp(min=0)[:, None], (masked_n * plan.mlm)[:, None]
        log_q_nV = F.log_softmax(student_nV, dim=-1)
        entropy = -(log_q_nV.gather(1, index_n1).squeeze(1) * masked_n).sum()
        if plan.learn:
            mlm_nV = log_q_nV.exp_().mul_(scale_n1).scatter_add_(1, index_n1, -scale_n1)
            grad_nV = mlm_nV if plan.distil is None else grad_nV.add_(mlm_nV)
    return kl, entropy, grad_nV


def _cosine_sum(student_ND: Tensor, teacher_ND: Tensor, valid_N: Tensor | None) -> Tensor:
    """Sum over rows of 1 - cos; the small term is that of CosineEmbeddingLoss and keeps zero vectors finite."""
    dtype = _sum_dtype(student_ND.dtype)
    student_ND, teacher_ND = student_ND.to(dtype), teacher_ND.to(dtype)
    if valid_N is not None:
        student_ND = student_ND.masked_fill(~valid_N[:, None], 0)
        teacher_ND = teacher_ND.masked_fill(~valid_N[:, None], 0)
    squares_N = ((student_ND**2).sum(-1) + 1e-12) * ((teacher_ND**2).sum(-1) + 1e-12)
    distance_N = 1 - (student_ND * teacher_ND).sum(-1) * squares_N.rsqrt()
    return (distance_N if valid_N is None else distance_N.masked_fill(~valid_N, 0)).sum()


def _inverse(count: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 / count, and 0 for 0: a step without masked rows has an mlm loss of 0. Asks nothing of the device."""
    if isinstance(count, Tensor):
        count = count.to(device=device, dtype=dtype)
        return torch.where(count > 0, 1 / count, 0)
    return torch.full((), 1 / count if count > 0 else 0.0, dtype=dtype, device=device)


def _rows_in_chunk(weight_VH: Tensor) -> int:
    """On a CPU a chunk should stay near the cache; on a GPU about 256 MB of float32 logits make its GEMMs large."""
    return 256 if weight_VH.device.type == "cpu" else max(256, 2**26 // weight_VH.shape[0])


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gemm_dtype(features: Tensor) -> torch.dtype:
    """Matrix products: what autocast says, else the dtype of the features; float64 stays."""
    device = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype
