"""FLOP per token of the throughput cases, from models on the meta device, which take no memory.

    case_flops(CAMEMBERT, "cached", "masked")        # 2.8e8

The share of masked positions is that of the default recipe.
"""

import torch

from tasks.recipe.config import LossSettings, MaskSettings
from tasks.train.flops import encoder_work, matrix_rate, training_work
from tests.benchmarks.synthetic import Size, random_model, random_vocabulary


def case_flops(size: Size, kind: str, positions: str = "all") -> float:
    """FLOP per token of `kind` ("capture", "cached", "online" or "reference") with loss on `positions`.

    The reference runs encoder and LM head of both models on all positions.
    """
    vocabulary = random_vocabulary(size)
    with torch.device("meta"):
        teacher, student = (random_model(size, layers, vocabulary) for layers in (size.layers, size.student_layers))
    if kind == "reference":
        return training_work(student, size.length, LossSettings(), teacher, online=True).of(1, 1)
    share = MaskSettings().rate if positions == "masked" else 1.0
    if kind == "capture":
        return encoder_work(teacher, size.length).of(1, share)
    return training_work(student, size.length, LossSettings(), teacher, online=kind == "online").of(1, share)


def measured_matrix_rate(device: str) -> float:
    """FLOP per second that MFU is measured against: bf16 on a GPU; small and in float32 on a CPU, as bf16 is slow."""
    if device == "cuda":
        return matrix_rate(torch.device(device))
    return matrix_rate(torch.device(device), 256, torch.float32)
