"""FLOP a token of the cases of tests/benchmarks/gpu.py, of models without memory for their weights.

    case_flops(CAMEMBERT, "cached masked")        # 2.8e8

The share of masked positions is that of the default recipe.
"""

import torch

from tasks.recipe.config import LossSettings, MaskSettings
from tasks.train.flops import encoder_work, training_work
from tests.benchmarks.synthetic import Size, random_model, random_vocabulary


def case_flops(size: Size, case: str) -> float:
    """The reference's step runs encoder and LM head of both models on all positions."""
    vocabulary = random_vocabulary(size)
    with torch.device("meta"):
        teacher, student = (random_model(size, layers, vocabulary) for layers in (size.layers, size.student_layers))
    if case == "reference":
        return training_work(student, size.length, LossSettings(), teacher, online=True).of(1, 1)
    kind, positions = case.split()
    asked = MaskSettings().rate if positions == "masked" else 1.0
    if kind == "capture":
        return encoder_work(teacher, size.length).of(1, asked)
    return training_work(student, size.length, LossSettings(), teacher, online=kind == "online").of(1, asked)
