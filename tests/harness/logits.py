"""Logits at selected positions in one call, with gradients: for tests, where B x M x V is small."""

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tasks.models.forward import decoder_of, head_features, hidden_rows


def logits_rows(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, positions_BM: Tensor | None
) -> Tensor:
    """Logits [B, M, V] at `positions_BM`, by the same functions as training (see `hidden_rows`)."""
    hidden_BMD = hidden_rows(model, input_ids_BL, attention_mask_BL, positions_BM)
    return F.linear(head_features(model, hidden_BMD), *decoder_of(model))
