"""Runs encoder and LM head at selected positions only: the forward pass of teacher capture, training and evaluation.

    hidden_BMD = hidden_rows(model, input_ids_BL, attention_mask_BL, positions_BM)   # last hidden state
    for logits_nV in logits_in_chunks(model, hidden_BMD.flatten(0, 1)):              # evaluation: logits in chunks
        ...
    features_BMH = head_features(model, hidden_BMD)                                  # training: LM head without decoder
    weight_VH, bias_V = decoder_of(model)                                            # the decoder of the LM head

With the default mask rate, the last layer is needed at one position in seven. In the families with a fast path
(RoBERTa, CamemBERT, XLM-R, BERT, ModernBERT), the last layer therefore computes keys and values at all positions, but
queries, attention output and feed-forward at the selected positions only. The fast path never synchronises with the
device, and its output shapes depend on input shapes alone, so torch.compile needs no graph break.

Shapes: B blocks, L tokens, M positions per block, N rows (positions of all blocks), n rows of one chunk, D hidden size,
H head features, V vocabulary, h attention heads.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import gelu

from storage.errors import FatalError

CHUNK_POSITIONS = 1024
"""Rows per chunk of logits (131 MB in float32 for 32,005 tokens)."""


def hidden_rows(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, positions_BM: Tensor | None
) -> Tensor:
    """Returns the last hidden states [B, M, D] (after the last norm, the input of the LM head) at `positions_BM`
    (int64).

    `attention_mask_BL`: 1 or True at tokens, 0 or False at padding; None: no padding, and no mask is built.
    `positions_BM`: unused slots may contain any valid index; None: all positions, in order. Dropout and gradients are
    the same as in the model's own forward pass.
    """
    family = _FAMILIES.get(type(model).__name__)
    if positions_BM is not None and family is not None and supports(model):
        return family.rows(model, input_ids_BL, attention_mask_BL, positions_BM)
    hidden_BLD: Tensor = model.base_model(input_ids=input_ids_BL, attention_mask=attention_mask_BL)[0]
    return hidden_BLD if positions_BM is None else _take(hidden_BLD, positions_BM)


def supports(model: PreTrainedModel) -> bool:
    """Returns whether `hidden_rows` has a fast path for this model; otherwise it computes all positions and selects."""
    config: Any = model.config
    return (
        type(model).__name__ in _FAMILIES
        and type(model).__module__.startswith("transformers.")  # not remote code of the same class name
        and not getattr(config, "is_decoder", False)
        and config._attn_implementation in ("sdpa", "eager")
    )


def head_features(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Applies the LM head up to its decoder (dense layer, activation, norm): [..., D] to [..., H].

    FatalError: the architecture of the model is not supported.
    """
    return _family(model).features(model, hidden)


def decoder_of(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Returns weight [V, H] and bias [V] of the decoder, the last layer of the LM head; the bias is zeros if it has
    none.

    Both are the parameters themselves, not copies. FatalError: the architecture of the model is not supported.
    """
    _family(model)
    decoder: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight_VH: Tensor = decoder.weight
    return weight_VH, weight_VH.new_zeros(weight_VH.shape[0]) if decoder.bias is None else decoder.bias


@torch.no_grad()
def logits_in_chunks(
    model: PreTrainedModel, hidden_ND: Tensor, chunk_rows: int = CHUNK_POSITIONS, vocabulary_size: int | None = None
) -> Iterator[Tensor]:
    """Yields float32 logits [n, V] of hidden states [N, D], `chunk_rows` rows at a time, without gradients.

    This bounds the memory of evaluation: the logits of all N rows never exist at once. To pair the chunks with labels
    or targets, split those with `torch.split(x_N, chunk_rows)`. `vocabulary_size`: restricts the logits to the
    tokenizer's tokens, for a decoder with padding rows. Under autocast, matrix products run in the autocast dtype.

    FatalError: the architecture of the model is not supported.
    """
    weight_VH, bias_V = (parameter[:vocabulary_size] for parameter in decoder_of(model))
    for hidden_nD in torch.split(hidden_ND, chunk_rows):
        yield F.linear(head_features(model, hidden_nD), weight_VH, bias_V).float()


def longest_input(model: PreTrainedModel) -> int:
    """Returns the maximum number of tokens per block.

    The RoBERTa family numbers positions from its pad id + 1, so it accepts fewer than max_position_embeddings.
    """
    config: Any = model.config
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    return int(config.max_position_embeddings) - (0 if offset is None else int(offset) + 1)


class _Family(NamedTuple):
    """The fast path of one architecture, and its LM head up to the decoder."""

    rows: Callable[[Any, Tensor, Tensor | None, Tensor], Tensor]
    features: Callable[[Any, Tensor], Tensor]


def _family(model: PreTrainedModel) -> _Family:
    name = type(model).__name__
    if name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise FatalError(
            f"the architecture {name} is not supported; use a model of one of these architectures: {known}"
        )
    return _FAMILIES[name]


def _bert_rows(model: Any, input_ids_BL: Tensor, mask_BL: Tensor | None, positions_BM: Tensor) -> Tensor:
    """Fast path of BERT and the RoBERTa family: post-norm layers, learned position embeddings."""
    base = model.base_model
    hidden_BLD = base.embeddings(input_ids=input_ids_BL)
    keep_B11L = None if mask_BL is None else mask_BL.bool()[:, None, None, :]
    mask = _mask_for(model, keep_B11L, hidden_BLD.dtype)
    *layers, last = base.encoder.layer
    for layer in layers:
        hidden_BLD = layer(hidden_BLD, mask)
    attention = last.attention.self
    rows_BMD = _take(hidden_BLD, positions_BM)
    query_BhMd = _heads(attention.query(rows_BMD), attention.attention_head_size)
    key_BhLd = _heads(attention.key(hidden_BLD), attention.attention_head_size)
    value_BhLd = _heads(attention.value(hidden_BLD), attention.attention_head_size)
    dropout = attention.dropout.p if model.training else 0.0
    context_BhMd = F.scaled_dot_product_attention(
        query_BhMd, key_BhLd, value_BhLd, attn_mask=keep_B11L, dropout_p=dropout, scale=attention.scaling
    )
    attended_BMD = last.attention.output(context_BhMd.transpose(1, 2).flatten(-2), rows_BMD)
    result_BMD: Tensor = last.feed_forward_chunk(attended_BMD)
    return result_BMD


def _modernbert_rows(model: Any, input_ids_BL: Tensor, mask_BL: Tensor | None, positions_BM: Tensor) -> Tensor:
    """Fast path of ModernBERT: pre-norm layers, rotary position embeddings, full and sliding-window attention."""
    base, config = model.base_model, model.config
    hidden_BLD = base.embeddings(input_ids=input_ids_BL)
    steps_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    full = near = None if mask_BL is None else mask_BL.bool()[:, None, None, :]
    if len(steps_L) - 1 > config.sliding_window:
        near_11LL = ((steps_L[:, None] - steps_L).abs() <= config.sliding_window)[None, None]
        near = near_11LL if full is None else near_11LL & full
    keeps = {"full_attention": full, "sliding_attention": near}
    rotary = {kind: base.rotary_emb(hidden_BLD, steps_L[None], kind) for kind in dict.fromkeys(config.layer_types)}
    masks = {kind: _mask_for(model, keep, hidden_BLD.dtype) for kind, keep in keeps.items()}
    *layers, last = base.layers
    for layer in layers:
        kind = layer.attention_type
        hidden_BLD = layer(hidden_BLD, attention_mask=masks[kind], position_embeddings=rotary[kind])
    kind = last.attention_type
    keep = keeps[kind]
    if keep is not None and keep.shape[-2] > 1:  # the mask differs by query: select the rows of the selected queries
        keep = _take(keep.squeeze(1).expand(len(positions_BM), -1, -1), positions_BM)[:, None]
    rows_BMD = _take(hidden_BLD, positions_BM)
    attended_BMD = rows_BMD + _modernbert_attention(last, hidden_BLD, rows_BMD, positions_BM, rotary[kind], keep)
    attended_BMD = attended_BMD + last.mlp(last.mlp_norm(attended_BMD))
    result_BMD: Tensor = base.final_norm(attended_BMD)
    return result_BMD


def _modernbert_attention(
    layer: Any,
    hidden_BLD: Tensor,
    rows_BMD: Tensor,
    positions_BM: Tensor,
    rotary: tuple[Tensor, Tensor],
    keep: Tensor | None,
) -> Tensor:
    """Returns the attention output [B, M, D] of `layer` at the selected rows; `keep` broadcasts to [B, h, M, L]."""
    attention = layer.attn
    projection, size = attention.Wqkv, hidden_BLD.shape[-1]
    bias_q, bias_kv = (None, None) if projection.bias is None else projection.bias.split((size, 2 * size))
    weight_q, weight_kv = projection.weight.split((size, 2 * size))
    query_BhMd = _heads(F.linear(layer.attn_norm(rows_BMD), weight_q, bias_q), attention.head_dim)
    both_BLE = F.linear(layer.attn_norm(hidden_BLD), weight_kv, bias_kv)
    key_BhLd, value_BhLd = (_heads(part, attention.head_dim) for part in both_BLE.chunk(2, dim=-1))
    cos_1Ld, sin_1Ld = rotary
    query_BhMd = _rotate(query_BhMd, cos_1Ld[0, positions_BM], sin_1Ld[0, positions_BM])
    key_BhLd = _rotate(key_BhLd, cos_1Ld, sin_1Ld)
    dropout = attention.attention_dropout if layer.training else 0.0
    context_BhMd = F.scaled_dot_product_attention(
        query_BhMd, key_BhLd, value_BhLd, attn_mask=keep, dropout_p=dropout, scale=attention.head_dim**-0.5
    )
    result_BMD: Tensor = attention.out_drop(attention.Wo(context_BhMd.transpose(1, 2).flatten(-2)))
    return result_BMD


def _heads(x_BLD: Tensor, size: int) -> Tensor:
    """Splits the last dimension into heads: [B, L, D] to [B, heads, L, size]."""
    return x_BLD.view(*x_BLD.shape[:-1], -1, size).transpose(1, 2)


def _rotate(x_BhLd: Tensor, cos_BLd: Tensor, sin_BLd: Tensor) -> Tensor:
    """Applies rotary position embeddings, in float32 as in ModernBERT."""
    wide = x_BhLd.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos_BLd[:, None] + turned * sin_BLd[:, None]).to(x_BhLd.dtype)


def _mask_for(model: Any, keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Converts the attention mask to the form that the implementation expects: boolean for sdpa, additive for eager."""
    if keep is None or model.config._attn_implementation == "sdpa":
        return keep
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


def _take(x_BLD: Tensor, positions_BM: Tensor) -> Tensor:
    """Gathers each block's rows at its positions: [B, L, D] to [B, M, D]."""
    return x_BLD.gather(1, positions_BM[:, :, None].expand(-1, -1, x_BLD.shape[-1]))


def _roberta_features(model: Any, hidden: Tensor) -> Tensor:
    head = model.lm_head
    result: Tensor = head.layer_norm(gelu(head.dense(hidden)))
    return result


def _bert_features(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = model.cls.predictions.transform(hidden)
    return result


def _modernbert_features(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = model.head(hidden)
    return result


_ROBERTA = _Family(_bert_rows, _roberta_features)

_FAMILIES: Mapping[str, _Family] = {
    "RobertaForMaskedLM": _ROBERTA,
    "CamembertForMaskedLM": _ROBERTA,
    "XLMRobertaForMaskedLM": _ROBERTA,
    "BertForMaskedLM": _Family(_bert_rows, _bert_features),
    "ModernBertForMaskedLM": _Family(_modernbert_rows, _modernbert_features),
}
