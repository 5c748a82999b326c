"""Computes the model FLOP of a training run from the shapes of its models: the numerator of FLOP utilisation (MFU).

    work = training_work(student, length, loss, teacher, online=False)
    work.of(tokens, positions) / seconds / matrix_rate(device)          # MFU, 0 to 1

Only the matrix products of encoder, attention and LM head are counted. A multiply-add is two FLOP, and a backward pass
costs twice the forward pass (PaLM, arXiv:2204.02311, appendix B). Products that need not be computed are not counted:
the LM head at positions without a loss and, in the last layer, everything but keys and values at those positions. So a
trainer that becomes twice as fast by skipping such work does not get twice the MFU.
"""

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tasks.models.forward import decoder_of, supports
from tasks.recipe.config import LossSettings


class Work(NamedTuple):
    """FLOP per token read, plus FLOP per selected position."""

    token: float
    position: float

    def of(self, tokens: float, positions: float) -> float:
        """Returns the FLOP for these numbers of tokens and selected positions, which are equal if all are selected."""
        return tokens * self.token + positions * self.position

    def times(self, factor: float) -> "Work":
        """Returns the FLOP multiplied by a factor."""
        return Work(factor * self.token, factor * self.position)

    def plus(self, other: "Work") -> "Work":
        """Returns the sum of both FLOP counts, field by field."""
        return Work(self.token + other.token, self.position + other.position)


def encoder_work(model: PreTrainedModel, length: int) -> Work:
    """Returns the FLOP of one encoder forward pass over blocks of `length` tokens, per token and selected position.

    Sliding-window attention counts as full attention.
    """
    layers, width = int(model.config.num_hidden_layers), int(model.config.hidden_size)
    own = model.base_model.named_parameters()
    matrices = sum(x.numel() for name, x in own if x.dim() == 2 and not name.startswith("embeddings."))
    layer = 2.0 * matrices / layers + 4.0 * length * width
    if not supports(model):
        return Work(layers * layer, 0.0)
    keys_and_values = 4.0 * width**2
    return Work((layers - 1) * layer + keys_and_values, layer - keys_and_values)


def head_work(model: PreTrainedModel) -> Work:
    """Returns the FLOP of one forward pass of the LM head, decoder included, per selected position."""
    weight, _ = decoder_of(model)
    outside = (x for name, x in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}."))
    before_decoder = sum(x.numel() for x in outside if x.dim() == 2 and x is not weight)
    return Work(0.0, 2.0 * (before_decoder + weight.numel()))


def training_work(
    student: PreTrainedModel,
    length: int,
    loss: LossSettings,
    teacher: PreTrainedModel | None = None,
    *,
    online: bool = False,
) -> Work:
    """Returns the FLOP of training, per token and selected position.

    They are those of the student's forward and backward passes, of the teacher's LM head for the distil term, and of
    the teacher's encoder if `online`. Unless `online`, the teacher may consist of its LM head alone, as in training
    from cached targets.
    """
    work = encoder_work(student, length).times(3)
    if loss.distil or loss.mlm:
        work = work.plus(head_work(student).times(3))
    if teacher is not None and loss.distil:
        work = work.plus(head_work(teacher))
    if teacher is not None and online:
        work = work.plus(encoder_work(teacher, length))
    return work


def matrix_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measures the FLOP per second of large matrix products on this device: the denominator of MFU.

    Returns the best of ten rounds.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work; a CPU queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
