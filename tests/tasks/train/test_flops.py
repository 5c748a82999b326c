"""The FLOP formulas of MFU, compared with the matrix products that torch counts in a forward pass."""

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tasks.models.forward import hidden_rows
from tasks.recipe.config import LossSettings
from tasks.train.flops import encoder_work, head_work, matrix_rate, training_work
from tests.harness.logits import logits_rows

BLOCKS, LENGTH, SELECTED = 3, 24, 5
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 3}

SPECIAL = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}


def tiny(family: str) -> PreTrainedModel:
    """A tiny model; only its shapes matter."""
    config = getattr(transformers, f"{family}Config")(**SIZES, max_position_embeddings=40, pad_token_id=1, **SPECIAL)
    config._attn_implementation = "sdpa"
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def counted_flops(model: PreTrainedModel, positions: torch.Tensor | None, *, head: bool) -> int:
    """FLOP of a forward pass, as torch counts them."""
    ids = torch.full((BLOCKS, LENGTH), 7)
    # On a CPU, torch counts the products of attention only with the MATH backend.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        (logits_rows if head else hidden_rows)(model.eval(), ids, None, positions)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["Camembert", "Bert", "ModernBert"])
def test_a_forward_pass_has_the_flops_that_torch_counts(family: str) -> None:
    model = tiny(family)
    few = torch.arange(SELECTED).expand(BLOCKS, -1)
    body, head = encoder_work(model, LENGTH), head_work(model)
    for positions, selected in ((None, LENGTH), (few, SELECTED)):
        tokens, rows = BLOCKS * LENGTH, BLOCKS * selected
        assert counted_flops(model, positions, head=False) == body.of(tokens, rows)
        assert counted_flops(model, positions, head=True) == body.plus(head).of(tokens, rows)


def test_a_training_is_three_forward_passes_and_the_teachers_part() -> None:
    student, teacher = tiny("Camembert"), tiny("Camembert")
    body, head, teacher_head = encoder_work(student, LENGTH), head_work(student), head_work(teacher)
    own = body.plus(head).times(3)
    assert training_work(student, LENGTH, LossSettings(distil=0, cosine=0, mlm=1)) == own
    assert training_work(student, LENGTH, LossSettings(), teacher) == own.plus(teacher_head)
    assert training_work(student, LENGTH, LossSettings(), teacher, online=True) == own.plus(teacher_head).plus(body)
    assert training_work(student, LENGTH, LossSettings(distil=0, cosine=1, mlm=0), teacher) == body.times(3)


def test_the_matrix_rate_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), 64, torch.float32) > 1e6
