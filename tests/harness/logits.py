"""Computes logits at selected positions in one call, with gradients, for tests in which B x M x V is small."""

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tasks.models.forward import decoder_of, head_features, hidden_rows


def logits_rows(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, positions_BM: Tensor | None
) -> Tensor:
    """Returns logits [B, M, V] at `positions_BM`, computed by the functions that training uses (see `hidden_rows`)."""
    hidden_BMD = hidden_rows(model, input_ids_BL, attention_mask_BL, positions_BM)
    return F.linear(head_features(model, hidden_BMD), *decoder_of(model))
