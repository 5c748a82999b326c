"""Scores a masked language model on held-out text: accuracy and loss at masked positions, and agreement with a teacher.

    protocol = heldout_protocol(blocks, recipe.mask, 256, teacher_fingerprint)
    compute = lambda: score_heldout(model, vocabulary, blocks, recipe.mask, 256, teacher)
    scores = make_scores(store, ScoreKey(model_key, protocol, "heldout"), compute)

Every model sees the same blocks under the same masks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from storage.artifact import Ref
from storage.errors import FatalError
from tasks.eval.loaded_model import eval_mode
from tasks.eval.scores import TEACHER_PREFIX, Scores, not_run
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.recipe.config import MaskSettings
from tasks.tokens.blocks import Blocks
from tasks.tokens.mask import IGNORE_INDEX, mask_rows
from tasks.tokens.vocabulary import Vocabulary

MASK_SEED = 2_205_111
"""Seed of the masks of all held-out scores; `score_mask` ensures that it differs from the training seed."""

PROTOCOL_VERSION = 2
"""Must be increased when the definition of a held-out figure changes or a figure is added."""

FORWARD_TOKENS = 8192
"""Tokens in one forward pass."""

CHUNK_POSITIONS = 512
"""Masked positions whose logits are in memory at once (64 MB per model for a vocabulary of 32,005 tokens)."""


# ---- protocol ----------------------------------------------------------------------------------------------


def score_mask(mask: MaskSettings, masks: int = 1) -> MaskSettings:
    """Returns the mask settings for scoring: `masks` uniform masks with the recipe's rate and a fixed seed.

    Models trained with different masks are therefore scored under the same masks, and never under their training masks.
    """
    return MaskSettings(seed=MASK_SEED if mask.seed != MASK_SEED else MASK_SEED + 1, rate=mask.rate, variants=masks)


def heldout_protocol(
    blocks: Sequence[Blocks | Ref], mask: MaskSettings, limit: int, teacher: str = "", masks: int = 1
) -> dict[str, Any]:
    """Returns the protocol in the key of held-out scores; `teacher` is a fingerprint, or "" without a teacher."""
    settings = score_mask(mask, masks).model_dump(mode="json")
    blocks_keys = [part.key for part in blocks]
    return {"version": PROTOCOL_VERSION, "mask": settings, "rows": limit, "blocks": blocks_keys, "teacher": teacher}


# ---- scores ------------------------------------------------------------------------------------------------


def score_heldout(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    blocks: Sequence[Blocks],
    mask: MaskSettings,
    limit: int,
    teacher: PreTrainedModel | None = None,
    masks: int = 1,
) -> Scores:
    """Scores the masked positions of up to `limit` blocks, evenly spaced over all held-out blocks.

    Each block is scored under `masks` masks; more masks reduce the variance if held-out text is scarce.

    blocks, positions      number of blocks, and of masked positions (a position counts once per mask)
    top1, top1_se          share of positions where the most probable token is the true one (masked top-1 accuracy),
                           and its standard error, clustered by block
    top1_at_mask           top-1 accuracy at positions where the input is the mask token (80 % of them; the other
                           inputs are the true token or a random one)
    mlm_loss, perplexity   mean cross-entropy in nats per position, and its exponential
    frequent_top1          f, the top-1 accuracy of always predicting the most frequent of these labels
    teacher_*              the same figures of the teacher at the same positions
    kl, agreement          mean KL(teacher || student) in nats at temperature 1; share of positions where both models
                           have the same most probable token
    kept                   (top1 - f) / (teacher_top1 - f); absent if the teacher is not better than f
    by_block               sums per block (positions, hits, teacher_hits, kl), for `block_counts`

    The softmax covers the tokens of the tokenizer, without the padding rows of the decoder. Returns a `not_run` value
    if no position can be scored. FatalError if the logits of a model are not finite.
    """
    if not sum(map(len, blocks)):
        return not_run("the corpus has no held-out text; increase corpus.heldout_per_mille or use a larger corpus")
    models = [model] if teacher is None else [model, teacher]
    with eval_mode(*models), torch.no_grad():
        batches = _batches(blocks, vocabulary, score_mask(mask, masks), limit)
        parts = [_score_batch(models, batch, vocabulary) for batch in batches]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not len(columns["label"]):
        return not_run("the held-out blocks contain no token that can be masked; increase corpus.heldout_per_mille")
    if not all(np.isfinite(values).all() for values in columns.values()):
        raise FatalError(
            "the model's predictions on held-out text are not finite; train again with a lower train.lr, or use a "
            "different teacher"
        )
    return _figures(columns)


def evenly_spaced_rows(total: int, limit: int) -> npt.NDArray[np.int64]:
    """Returns up to `limit` row numbers below `total`, ascending and evenly spaced."""
    count = min(total, limit)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


# ---- batches -----------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """B masked rows of length L with M slots for masked positions per row, N of them in use."""

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    valid: Tensor
    labels: Tensor
    at_mask: npt.NDArray[np.bool_]
    """[N]: True if the input at the position is the mask token."""
    block: npt.NDArray[np.int64]
    """[N]: number of the position's block among all held-out blocks."""


def _batches(blocks: Sequence[Blocks], vocabulary: Vocabulary, mask: MaskSettings, limit: int) -> Iterator[_Batch]:
    chosen = evenly_spaced_rows(sum(map(len, blocks)), limit)
    first = 0
    for part in blocks:
        rows = chosen[(chosen >= first) & (chosen < first + len(part))] - first
        size = max(1, FORWARD_TOKENS // part.input_ids.shape[1])
        for start in range(0, len(rows), size):
            for variant in range(mask.variants):
                yield _batch(part, rows[start : start + size], first, vocabulary, mask, variant)
        first += len(part)


def _batch(
    part: Blocks, rows: npt.NDArray[np.int64], first: int, vocabulary: Vocabulary, mask: MaskSettings, variant: int
) -> _Batch:
    lengths = part.lengths[rows]
    masked = mask_rows(part.key, rows, part.input_ids[rows], lengths, vocabulary, mask, None, variant)
    input_ids = masked.input_ids[:, : lengths.max()]
    attended = np.arange(input_ids.shape[1]) < lengths[:, None]
    inputs = np.take_along_axis(input_ids, masked.positions, axis=1)[masked.valid]
    return _Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
        attention_mask=None if attended.all() else torch.from_numpy(attended),
        positions=torch.from_numpy(masked.positions),
        valid=torch.from_numpy(masked.valid),
        labels=torch.from_numpy(masked.labels[masked.labels != IGNORE_INDEX]),
        at_mask=inputs == vocabulary.mask,
        block=np.repeat(first + rows, masked.valid.sum(axis=1)),
    )


# ---- values per position -----------------------------------------------------------------------------------


def _score_batch(models: list[PreTrainedModel], batch: _Batch, vocabulary: Vocabulary) -> dict[str, npt.NDArray[Any]]:
    """Returns columns with one value per position; the first model is the student, the second its teacher."""
    features = [_head_features(model, batch) for model in models]
    chunks: list[dict[str, Tensor]] = []
    for start in range(0, len(batch.labels), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        log_probs = [
            _log_probs(model, features_NH[chunk], vocabulary.size)
            for model, features_NH in zip(models, features, strict=True)
        ]
        chunks.append(_compare(log_probs, batch.labels[chunk]))
    names = chunks[0] if chunks else {}
    columns = {name: torch.cat([piece[name] for piece in chunks]).double().numpy() for name in names}
    return {"label": batch.labels.numpy(), "at_mask": batch.at_mask, "block": batch.block, **columns}


def _head_features(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """Returns the input [N, H] of the LM head's decoder at the N masked positions."""
    device = model.device
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    hidden_BMD = hidden_rows(model, batch.input_ids.to(device), mask, batch.positions.to(device))
    return head_features(model, hidden_BMD[batch.valid.to(device)])


def _log_probs(model: PreTrainedModel, features_nH: Tensor, tokens: int) -> Tensor:
    """Returns log-probabilities [n, tokens]."""
    weight_VH, bias_V = decoder_of(model)
    logits_nV = F.linear(features_nH, weight_VH[:tokens], bias_V[:tokens])
    return F.log_softmax(logits_nV.float(), dim=-1)


def _compare(log_probs: list[Tensor], labels_n: Tensor) -> dict[str, Tensor]:
    """Returns the loss and hit of each model per position, with a teacher also KL and agreement; all on the CPU."""
    columns: dict[str, Tensor] = {}
    for prefix, log_p_nV in zip(("", TEACHER_PREFIX), log_probs, strict=False):
        label_n = labels_n.to(log_p_nV.device)
        columns[f"{prefix}loss"] = -log_p_nV.gather(1, label_n[:, None]).squeeze(1).cpu()
        columns[f"{prefix}hit"] = (log_p_nV.argmax(-1) == label_n).cpu()
    if len(log_probs) == 2:
        student_nV, teacher_nV = log_probs[0], log_probs[1].to(log_probs[0].device)
        columns["kl"] = (teacher_nV.exp() * (teacher_nV - student_nV)).sum(-1).cpu()
        columns["agree"] = (teacher_nV.argmax(-1) == student_nV.argmax(-1)).cpu()
    return columns


# ---- figures -----------------------------------------------------------------------------------------------


def _figures(columns: dict[str, npt.NDArray[Any]]) -> Scores:
    frequent = float(np.bincount(columns["label"]).max() / len(columns["label"]))
    scores: Scores = {
        "blocks": float(len(np.unique(columns["block"]))),
        "positions": float(len(columns["label"])),
        "frequent_top1": frequent,
        **_model_figures(columns, ""),
    }
    if "kl" in columns:
        scores |= _model_figures(columns, TEACHER_PREFIX)
        scores |= {"kl": float(columns["kl"].mean()), "agreement": float(columns["agree"].mean())}
        if scores["teacher_top1"] > frequent:
            scores["kept"] = (scores["top1"] - frequent) / (scores["teacher_top1"] - frequent)
    return scores | {"by_block": _sums_by_block(columns)}


def _model_figures(columns: dict[str, npt.NDArray[Any]], prefix: str) -> Scores:
    """Returns accuracy and loss of one model; `prefix` is the prefix of its columns and of the names of its figures."""
    hit, loss = columns[f"{prefix}hit"], float(columns[f"{prefix}loss"].mean())
    figures = {
        "top1": float(hit.mean()),
        "top1_se": clustered_standard_error(hit, columns["block"]),
        "mlm_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 exceeds the range of a float
    }
    if columns["at_mask"].any():
        figures["top1_at_mask"] = float(hit[columns["at_mask"]].mean())
    return {f"{prefix}{name}": value for name, value in figures.items()}


def _sums_by_block(columns: dict[str, npt.NDArray[Any]]) -> dict[str, list[float]]:
    number = np.unique(columns["block"], return_inverse=True)[1]
    sources = {"hits": "hit", "teacher_hits": "teacher_hit", "kl": "kl"}
    sums = {name: np.bincount(number, weights=columns[source]) for name, source in sources.items() if source in columns}
    return {name: values.tolist() for name, values in ({"positions": np.bincount(number)} | sums).items()}


def block_counts(figures: Scores, name: str) -> npt.NDArray[np.float64]:
    """Returns the numerator and denominator per held-out block of a mean over positions: [1, B, 2].

    `name` is hits, teacher_hits or kl. `paired_difference` accepts the result.
    """
    blocks = figures["by_block"]
    return np.stack([np.array(blocks[name], float), np.array(blocks["positions"], float)], axis=-1)[None]


def clustered_standard_error(values: npt.NDArray[Any], cluster: npt.NDArray[Any]) -> float:
    """Returns the standard error of the mean of `values` [N] that are correlated within clusters (ratio estimator).

    The tokens of one block are not independent, so sqrt(p (1 - p) / N) would be too small. With a single cluster, the
    plain standard error is returned, since nothing better can be estimated.
    """
    mean = values.mean()
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=values - mean)
    if len(sums) == 1:
        return float(values.std() / math.sqrt(len(values)))
    return float(math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
