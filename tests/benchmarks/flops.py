"""Arithmetic of one token, from the sizes of a model: what MFU is counted with. Multiply and add are two.

    case_flops(CAMEMBERT, "cached masked")        # 2.8e8

Only matrix products count, of encoder, attention and LM head; backward is twice the forward. The share of masked
positions is that of the default recipe.
"""

from tasks.config import Mask
from tests.benchmarks.synthetic import Size

MASKED = Mask().rate


def layer_flops(size: Size, asked: float = 1.0) -> float:
    """One layer; keys and values everywhere, the rest at the share `asked` of the positions."""
    keys_values, query_output, inner = 4 * size.width**2, 4 * size.width**2, 4 * size.width * size.inner
    attention = 4 * size.length * size.width
    return keys_values + asked * (query_output + inner + attention)


def encoder_flops(size: Size, layers: int, asked: float) -> float:
    """All layers, the last one short."""
    return (layers - 1) * layer_flops(size) + layer_flops(size, asked)


def head_flops(size: Size) -> float:
    """LM head of one position: dense layer and decoder."""
    return 2.0 * size.width**2 + 2.0 * size.width * size.vocab


def case_flops(size: Size, case: str) -> float:
    """FLOP a token of the cases of tests/benchmarks/gpu.py."""
    if case == "reference":
        both = 3 * encoder_flops(size, size.student_layers, 1.0) + encoder_flops(size, size.layers, 1.0)
        return both + 4 * head_flops(size)
    kind, positions = case.split()
    asked = MASKED if positions == "masked" else 1.0
    teacher = encoder_flops(size, size.layers, asked)
    if kind == "capture":
        return teacher
    student = 3 * encoder_flops(size, size.student_layers, asked) + (3 + 1) * asked * head_flops(size)
    return student + (teacher if kind == "online" else 0.0)
