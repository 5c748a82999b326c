"""The arithmetic that MFU is counted with, against the matrix products that torch counts in a real forward."""

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tasks.models.forward import hidden_rows, logits_rows
from tasks.recipe.config import LossSettings
from tasks.train.flops import encoder_work, head_work, matrix_rate, training_work

BLOCKS, LENGTH, ASKED = 3, 24, 5
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 3}

SPECIAL = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}


def tiny(family: str) -> PreTrainedModel:
    """Random weights; nothing but shapes matters."""
    config = getattr(transformers, f"{family}Config")(**SIZES, max_position_embeddings=40, pad_token_id=1, **SPECIAL)
    config._attn_implementation = "sdpa"
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def counted(model: PreTrainedModel, positions: torch.Tensor | None, *, head: bool) -> int:
    """FLOP of a forward as torch sees it."""
    ids = torch.full((BLOCKS, LENGTH), 7)
    # On a CPU torch counts the products of attention only where they are written out.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        (logits_rows if head else hidden_rows)(model.eval(), ids, None, positions)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["Camembert", "Bert", "ModernBert"])
def test_a_forward_costs_what_torch_counts(family: str) -> None:
    model = tiny(family)
    few = torch.arange(ASKED).expand(BLOCKS, -1)
    body, head = encoder_work(model, LENGTH), head_work(model)
    for positions, asked in ((None, LENGTH), (few, ASKED)):
        tokens, rows = BLOCKS * LENGTH, BLOCKS * asked
        assert counted(model, positions, head=False) == body.of(tokens, rows)
        assert counted(model, positions, head=True) == body.plus(head).of(tokens, rows)


def test_a_training_is_three_forwards_and_what_the_teacher_does() -> None:
    student, teacher = tiny("Camembert"), tiny("Camembert")
    body, head, told = encoder_work(student, LENGTH), head_work(student), head_work(teacher)
    own = body.plus(head).times(3)
    assert training_work(student, LENGTH, LossSettings(distil=0, cosine=0, mlm=1)) == own
    assert training_work(student, LENGTH, LossSettings(), teacher) == own.plus(told)
    assert training_work(student, LENGTH, LossSettings(), teacher, online=True) == own.plus(told).plus(body)
    assert training_work(student, LENGTH, LossSettings(distil=0, cosine=1, mlm=0), teacher) == body.times(3)


def test_a_matrix_rate_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), 64, torch.float32) > 1e6
