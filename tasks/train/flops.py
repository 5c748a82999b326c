"""Arithmetic of a training, from the shapes of its models: what model FLOP utilisation (MFU) is counted with.

    work = training_work(student, length, loss, teacher, online=False)
    work.of(tokens, positions) / seconds / matrix_rate(device)          # MFU, 0 to 1

Only matrix products count, a multiply and an add as two, of encoder, attention and LM head; backward is twice the
forward (PaLM, appendix B). What need not be computed does not count: where a position carries no loss there is no LM
head, and in the last layer nothing but keys and values. So twice the speed by leaving work out is not twice the MFU.
"""

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tasks.models.forward import decoder_of, supports
from tasks.recipe.config import LossSettings


class Work(NamedTuple):
    """FLOP of each token that is read, and on top of each position that is asked for."""

    token: float
    position: float

    def of(self, tokens: float, positions: float) -> float:
        """FLOP of so many; all positions of a text are asked for when positions = tokens."""
        return tokens * self.token + positions * self.position

    def times(self, factor: float) -> "Work":
        """As much again so many times."""
        return Work(factor * self.token, factor * self.position)

    def plus(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.token + other.token, self.position + other.position)


def encoder_work(model: PreTrainedModel, length: int) -> Work:
    """A forward through the encoder, in blocks of `length` tokens; attention in windows counts as if it were full."""
    layers, width = int(model.config.num_hidden_layers), int(model.config.hidden_size)
    own = model.base_model.named_parameters()
    matrices = sum(x.numel() for name, x in own if x.dim() == 2 and not name.startswith("embeddings."))
    layer = 2.0 * matrices / layers + 4.0 * length * width
    if not supports(model):
        return Work(layers * layer, 0.0)
    keys_and_values = 4.0 * width**2
    return Work((layers - 1) * layer + keys_and_values, layer - keys_and_values)


def head_work(model: PreTrainedModel) -> Work:
    """A forward through the LM head: what comes before the decoder, and the decoder."""
    weight, _ = decoder_of(model)
    outside = (x for name, x in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}."))
    before = sum(x.numel() for x in outside if x.dim() == 2 and x is not weight)
    return Work(0.0, 2.0 * (before + weight.numel()))


def training_work(
    student: PreTrainedModel,
    length: int,
    loss: LossSettings,
    teacher: PreTrainedModel | None = None,
    *,
    online: bool = False,
) -> Work:
    """Forward and backward of the student, and the teacher's part: its LM head for distil, its encoder if `online`.

    A teacher of which only the head is left, as a training from the cache keeps it, will do.
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
    """FLOP a second of large matrix products on this device, the best of ten rounds: what MFU is measured against."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            one @ other
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
