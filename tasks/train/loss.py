"""Computes the distillation loss and its terms from the logits and hidden states of student and teacher.

    losses = fused_loss(features_NH, weight_VH, bias_V, labels_N, weights=..., temperature=2.0, counts=...)
    losses.total.backward()

    total  = w_distil x distil + w_cosine x cosine + w_mlm x mlm

    distil = T^2 / N x sum_n KL(p_n || q_n)         p = softmax(teacher logits / T), q = softmax(student logits / T)
    cosine = 1 / N x sum_n (1 - cos(s_n, t_n))      s, t: last hidden states of student and teacher
    mlm    = 1 / K x sum_k -log softmax(student logits)[label_k]        at temperature 1

N is the number of selected rows of the step (the masked positions, or all attended ones), K the number of masked rows
among them. These are the terms of the DistilBERT training code (Sanh et al., 2019, arXiv:1910.01108; Hugging Face,
transformers-research-projects, distillation): a "batchmean" KL times T^2 (Hinton et al., 2015, arXiv:1503.02531),
CosineEmbeddingLoss with target 1, and cross-entropy that ignores label -100.

`combined_loss` computes the loss on full logits and is the specification. The trainer calls `fused_loss`, which
computes the same numbers from the inputs of the LM head's decoder, in chunks of rows. Each chunk computes its gradient
immediately, so no tensor of logits outlives its chunk and memory does not grow with N x V (compare Liger Kernel,
arXiv:2410.10989).

Shapes: N rows (selected positions), V vocabulary, H head features, D hidden size, n rows of one chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tasks.tokens.mask import IGNORE_INDEX

PADDED_BIAS = -1e4
"""Bias of a decoder row that belongs to no token. Not -inf: 0 x inf in the KL is NaN."""

ChunkLogits = Callable[[int, int], Tensor]
"""Returns the teacher's logits [n, V] of rows start to stop - 1. All values are finite, also in unused slots."""


class Weights(NamedTuple):
    """Weight of each term in the total."""

    distil: float
    cosine: float
    mlm: float


class Losses(NamedTuple):
    """The total and its unweighted terms, as scalar tensors."""

    total: Tensor
    distil: Tensor
    cosine: Tensor
    mlm: Tensor


class RowCounts(NamedTuple):
    """The divisors N and K: selected and masked rows of the whole step, over all its micro-batches and ranks."""

    selected: float | Tensor
    masked: float | Tensor


def combined_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    weights: Weights,
    temperature: float,
) -> Losses:
    """Computes the loss from full logits [N, V], hidden states [N, D] and labels [N] (-100: not masked).

    All rows are selected rows. A term of weight 0 is computed but does not enter the total.
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
    for weight, term in zip(weights, (distil, cosine, mlm), strict=True):
        if weight:
            total = total + weight * term
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
    """Computes a micro-batch's share of the loss of its step: each term is a sum over its rows, divided by `counts`.

    The losses of all micro-batches and ranks add up to the loss of the step, and their gradients to its gradient.

    `features_NH`: the input of the student's decoder, which is the last layer of its LM head. `weight_VH`, `bias_V`:
    that decoder. `teacher_logits`: see `decoder_logits`; may be None when the weight of distil is 0, and is not called
    then. `student_hidden_ND`, `teacher_hidden_ND`: may be None when the weight of cosine is 0. `valid_N`: False for
    slots that only fill a static shape; they add exactly 0, whatever their values are. `chunk_rows`: rows per chunk;
    None chooses by device and vocabulary. `vocab_multiple`: the decoder is padded to a multiple of this number of rows,
    for tensor cores.

    Only `total` has a gradient, with respect to features, weight, bias and student hidden states; backward through it
    works once. A term of weight 0 is not computed and is returned as 0. Matrix products run in the autocast dtype, else
    in the dtype of the features; softmax and sums run in float32, or in float64 when the features are float64. Nothing
    synchronises with the device.

    ValueError: the teacher input of a term with a weight is missing, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if weights.distil and teacher_logits is None:
        raise ValueError("the distil term needs teacher_logits")
    if weights.cosine and (student_hidden_ND is None or teacher_hidden_ND is None):
        raise ValueError("the cosine term needs student_hidden_ND and teacher_hidden_ND")
    dtype = _sum_dtype(features_NH.dtype)
    per_row, per_masked = (_reciprocal(count, dtype, labels_N.device) for count in counts)
    total = distil = cosine = mlm = torch.zeros((), dtype=dtype, device=labels_N.device)
    if weights.distil or weights.mlm:
        rows = _RowTensors(labels_N, valid_N, teacher_logits if weights.distil else None)
        plan = _ChunkPlan(
            distil_factor=weights.distil * temperature**2 * per_row if weights.distil else None,
            mlm_factor=weights.mlm * per_masked if weights.mlm else None,
            temperature=temperature,
            chunk_rows=chunk_rows or _rows_in_chunk(weight_VH),
            vocab_multiple=vocab_multiple,
            needs_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (features_NH, weight_VH, bias_V)),
        )
        total, distil_sum, mlm_sum = _decoder_loss(features_NH, weight_VH, bias_V, rows, plan)
        distil, mlm = distil_sum * temperature**2 * per_row, mlm_sum * per_masked
    if weights.cosine and student_hidden_ND is not None and teacher_hidden_ND is not None:
        # Only [N, D], so ordinary autograd is fine.
        cosine_sum = _cosine_sum(student_hidden_ND, teacher_hidden_ND, valid_N)
        total = total + weights.cosine * per_row * cosine_sum
        cosine = cosine_sum.detach() * per_row
    return Losses(total, distil, cosine, mlm)


def decoder_logits(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, vocab_multiple: int = 1) -> ChunkLogits:
    """Returns a function that computes the teacher's logits per chunk of rows.

    The logits come from the teacher's head features and decoder (see tasks.models.forward).
    """
    dtype = _gemm_dtype(features_NH)
    features_NH = features_NH.to(dtype)
    weight_VH, bias_V = pad_decoder(weight_VH.to(dtype), bias_V.to(dtype), vocab_multiple)

    def chunk(start: int, stop: int) -> Tensor:
        return torch.addmm(bias_V, features_NH[start:stop], weight_VH.t())

    return chunk


def pad_decoder(weight_VH: Tensor, bias_V: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Pads the decoder to a multiple of rows with zero rows of bias -1e4; their probability is 0 in float32."""
    extra = -weight_VH.shape[0] % multiple
    if not extra:
        return weight_VH, bias_V
    return F.pad(weight_VH, (0, 0, 0, extra)), F.pad(bias_V, (0, extra), value=PADDED_BIAS)


class _RowTensors(NamedTuple):
    """Labels, validity and teacher logits of the rows."""

    labels: Tensor
    valid: Tensor | None
    teacher_logits: ChunkLogits | None


class _ChunkPlan(NamedTuple):
    """Factors of the two sums in the total (None: weight 0), sizes, and whether gradients are needed."""

    distil_factor: Tensor | None
    mlm_factor: Tensor | None
    temperature: float
    chunk_rows: int
    vocab_multiple: int
    needs_gradient: bool


class _CarryGradient(torch.autograd.Function):
    """Attaches precomputed gradients to a value that was computed outside autograd."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        """`inputs_and_gradients`: features, weight, bias, then the gradient of each."""
        ctx.save_for_backward(*inputs_and_gradients[3:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the stored gradients multiplied by the incoming gradient."""
        features_NH, weight_VH, bias_V = ctx.saved_tensors
        return (None, features_NH * outer, weight_VH * outer, bias_V * outer, None, None, None)


def _decoder_loss(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, rows: _RowTensors, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted total (with gradient), the sum of KL and the sum of cross-entropies, over all chunks."""
    inputs = (features_NH, weight_VH, bias_V)
    dtype = _gemm_dtype(features_NH)
    with torch.no_grad(), torch.autocast(features_NH.device.type, enabled=False):
        distil_sum, mlm_sum, gradients = _walk_chunks(
            features_NH.to(dtype), weight_VH.to(dtype), bias_V.to(dtype), rows, plan
        )
        total = torch.zeros_like(distil_sum)
        if plan.distil_factor is not None:
            total = total + plan.distil_factor * distil_sum
        if plan.mlm_factor is not None:
            total = total + plan.mlm_factor * mlm_sum
    if plan.needs_gradient:
        typed = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)]
        total = _CarryGradient.apply(total, *inputs, *typed)  # type: ignore[no-untyped-call]
    return total, distil_sum, mlm_sum


def _walk_chunks(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, rows: _RowTensors, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Returns the sum of KL, the sum of cross-entropies and, if needed, the gradients of the total, over all chunks."""
    vocabulary, dtype = weight_VH.shape[0], _sum_dtype(features_NH.dtype)
    weight_VH, bias_V = pad_decoder(weight_VH, bias_V, plan.vocab_multiple)
    if rows.valid is not None:  # 0 x NaN is NaN: values in unused slots must not reach a GEMM
        features_NH = features_NH.masked_fill(~rows.valid[:, None], 0)
    distil_sum = mlm_sum = torch.zeros((), dtype=dtype, device=features_NH.device)
    if plan.needs_gradient:
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
        kl, cross_entropy, grad_nV = _chunk_loss(student_nV, teacher_nV, rows.labels[chunk], valid_n, plan)
        distil_sum, mlm_sum = distil_sum + kl, mlm_sum + cross_entropy
        if plan.needs_gradient:
            grad_bias += grad_nV.sum(0)
            grad_nV = grad_nV.to(features_nH.dtype)
            grad_features[chunk] = torch.mm(grad_nV, weight_VH)
            if grad_nV.dtype == dtype:
                grad_weight.addmm_(grad_nV.t(), features_nH)
            else:
                grad_weight += torch.mm(grad_nV.t(), features_nH)
    gradients = (grad_features, grad_weight[:vocabulary], grad_bias[:vocabulary]) if plan.needs_gradient else ()
    return distil_sum, mlm_sum, gradients


def _chunk_loss(
    student_nV: Tensor, teacher_nV: Tensor | None, labels_n: Tensor, valid_n: Tensor | None, plan: _ChunkPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum of KL, the sum of cross-entropies and, if needed, the gradient [n, V] of the total to the
    logits."""
    kl = cross_entropy = torch.zeros((), dtype=student_nV.dtype, device=student_nV.device)
    grad_nV = torch.zeros_like(kl)
    if teacher_nV is not None and plan.distil_factor is not None:
        log_p_nV = F.log_softmax(teacher_nV / plan.temperature, dim=-1)
        log_q_nV = F.log_softmax(student_nV / plan.temperature, dim=-1)
        p_nV = log_p_nV.exp()
        kl_n = (log_p_nV.sub_(log_q_nV).mul_(p_nV)).sum(-1)
        kl = (kl_n if valid_n is None else kl_n.masked_fill(~valid_n, 0)).sum()
        if plan.needs_gradient:
            grad_nV = log_q_nV.exp_().sub_(p_nV).mul_(plan.distil_factor / plan.temperature)
            if valid_n is not None:
                grad_nV.masked_fill_(~valid_n[:, None], 0)
    if plan.mlm_factor is not None:
        masked_n = labels_n != IGNORE_INDEX
        if valid_n is not None:
            masked_n = masked_n & valid_n
        index_n1, scale_n1 = labels_n.clamp(min=0)[:, None], (masked_n * plan.mlm_factor)[:, None]
        log_q_nV = F.log_softmax(student_nV, dim=-1)
        cross_entropy = -(log_q_nV.gather(1, index_n1).squeeze(1) * masked_n).sum()
        if plan.needs_gradient:
            mlm_nV = log_q_nV.exp_().mul_(scale_n1).scatter_add_(1, index_n1, -scale_n1)
            grad_nV = mlm_nV if plan.distil_factor is None else grad_nV.add_(mlm_nV)
    return kl, cross_entropy, grad_nV


def _cosine_sum(student_ND: Tensor, teacher_ND: Tensor, valid_N: Tensor | None) -> Tensor:
    """Returns the sum over rows of 1 - cos.

    The small constant is that of CosineEmbeddingLoss; it keeps the result for zero vectors finite.
    """
    dtype = _sum_dtype(student_ND.dtype)
    student_ND, teacher_ND = student_ND.to(dtype), teacher_ND.to(dtype)
    if valid_N is not None:
        student_ND = student_ND.masked_fill(~valid_N[:, None], 0)
        teacher_ND = teacher_ND.masked_fill(~valid_N[:, None], 0)
    squares_N = ((student_ND**2).sum(-1) + 1e-12) * ((teacher_ND**2).sum(-1) + 1e-12)
    distance_N = 1 - (student_ND * teacher_ND).sum(-1) * squares_N.rsqrt()
    return (distance_N if valid_N is None else distance_N.masked_fill(~valid_N, 0)).sum()


def _reciprocal(count: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns 1 / count, or 0 if the count is 0: a step without masked rows has an mlm loss of 0.

    Never synchronises with the device.
    """
    if isinstance(count, Tensor):
        count = count.to(device=device, dtype=dtype)
        return torch.where(count > 0, 1 / count, 0)
    return torch.full((), 1 / count if count > 0 else 0.0, dtype=dtype, device=device)


def _rows_in_chunk(weight_VH: Tensor) -> int:
    """Returns the rows per chunk.

    On a CPU, a chunk should fit into the cache; on a GPU, about 256 MB of float32 logits make the GEMMs large.
    """
    return 256 if weight_VH.device.type == "cpu" else max(256, 2**26 // weight_VH.shape[0])


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of softmax and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gemm_dtype(features: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products: the autocast dtype, else that of the features; float64 is never cast."""
    device = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype
