"""Scores on held-out text: what a masked language model predicts under the mask, and what it keeps of its teacher.

    trial = Trial(model_key, heldout_protocol(blocks, recipe.mask, 256, teacher_fingerprint), "heldout")
    scores = make_scores(store, trial, lambda: score_heldout(model, vocabulary, blocks, recipe.mask, 256, teacher))

Called by the flows, on blocks of tasks.block.open_blocks. Scores of any set are kept as artifacts by (model, protocol,
set, seed), so that a second run computes only what is missing. Models are compared in tasks.compare, fine-tuned in
tasks.ner.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from storage.artifact import Ref
from storage.errors import FatalError
from tasks.eval.scores import TEACHERS, Scores, not_run
from tasks.models.forward import decoder_of, head_features, hidden_rows
from tasks.recipe.config import MaskSettings
from tasks.tokens.blocks import Blocks
from tasks.tokens.mask import IGNORE_INDEX, mask_rows
from tasks.tokens.vocabulary import Vocabulary

MASK_SEED = 2_205_111
"""Masks of scores are the same for every recipe, and no training's: see `score_mask`."""

HELDOUT = 2
"""Changes when held-out figures mean something else or have more parts."""

FORWARD_TOKENS = 8192
"""Tokens in one forward."""

CHUNK_ROWS = 512
"""Masked positions whose logits exist at once (32,005 pieces: 64 MB a model)."""


# ---- held-out text -----------------------------------------------------------------------------------------


def score_mask(mask: MaskSettings, masks: int = 1) -> MaskSettings:
    """The `masks` masks of scores: the recipe's rate, but always uniform and with a seed of their own.

    So models trained with different masks are judged by one, and none is judged by the masks that it was trained on.
    """
    return MaskSettings(seed=MASK_SEED if mask.seed != MASK_SEED else MASK_SEED + 1, rate=mask.rate, variants=masks)


def heldout_protocol(
    blocks: Sequence[Blocks | Ref], mask: MaskSettings, limit: int, teacher: str = "", masks: int = 1
) -> dict[str, Any]:
    """The protocol of a held-out trial; `teacher` is its fingerprint, or "" when there is none."""
    settings = score_mask(mask, masks).model_dump(mode="json")
    blocks_keys = [part.key for part in blocks]
    return {"version": HELDOUT, "mask": settings, "rows": limit, "blocks": blocks_keys, "teacher": teacher}


def score_heldout(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    blocks: Sequence[Blocks],
    mask: MaskSettings,
    limit: int,
    teacher: PreTrainedModel | None = None,
    masks: int = 1,
) -> Scores:
    """Figures over the masked positions of up to `limit` blocks, taken evenly from all held-out blocks.

    Each block is shown under `masks` masks: where there is little held-out text, that makes the figures surer.

    blocks, positions   how many were scored (a position counts once a mask)
    top1, top1_se       share of positions where the true token comes first, and its standard error by blocks
    top1_at_mask        the same where the input shows the mask token (80 %; the rest shows the token or a random one)
    mlm_loss, perplexity   mean cross-entropy (nats a token), and its exponential
    frequent_top1       f: what always saying the most frequent of these labels would score
    teacher_*           the teacher's own figures on the same positions
    kl, agreement       mean KL(teacher || student) at T = 1 in nats; share of positions with the same first token
    kept                (top1 - f) / (teacher_top1 - f); left out where the teacher is no better than f
    by_block            sums by block (positions, hits, teacher_hits, kl), for `block_counts`

    Softmax runs over the tokenizer's pieces; rows that only pad a decoder do not count. `not_run` where there is
    nothing to score. FatalError where a model's logits are not finite.
    """
    if not sum(map(len, blocks)):
        return not_run("there is no held-out text; raise corpus.heldout_per_mille or give more text")
    models = [model] if teacher is None else [model, teacher]
    with evaluating(*models), torch.no_grad():
        batches = _batches(blocks, vocabulary, score_mask(mask, masks), limit)
        columns = [_columns(models, batch, vocabulary) for batch in batches]
    seen = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    if not len(seen["label"]):
        return not_run("the held-out blocks hold no token that can be masked")
    if not all(np.isfinite(seen[name]).all() for name in seen):
        raise FatalError("the model's predictions on held-out text are not finite; its weights are broken")
    return _figures(seen)


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, as it was before afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, before, strict=True):
            model.train(was_training)


def spread_rows(total: int, limit: int) -> npt.NDArray[np.int64]:
    """Up to `limit` of `total` row numbers, ascending and evenly spread."""
    taken = min(total, limit)
    return np.arange(taken, dtype=np.int64) * total // max(taken, 1)


class _Batch(NamedTuple):
    """B masked rows of length L, and the N chosen positions among their B x M slots."""

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    valid: Tensor
    labels: Tensor
    at_mask: npt.NDArray[np.bool_]
    """[N]: the input shows the mask token there."""
    block: npt.NDArray[np.int64]
    """[N]: which of all blocks the position is in."""


def _batches(blocks: Sequence[Blocks], vocabulary: Vocabulary, mask: MaskSettings, limit: int) -> Iterator[_Batch]:
    chosen = spread_rows(sum(map(len, blocks)), limit)
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
    shown = np.take_along_axis(input_ids, masked.positions, axis=1)[masked.valid]
    return _Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)),
        attention_mask=None if attended.all() else torch.from_numpy(attended),
        positions=torch.from_numpy(masked.positions),
        valid=torch.from_numpy(masked.valid),
        labels=torch.from_numpy(masked.labels[masked.labels != IGNORE_INDEX]),
        at_mask=shown == vocabulary.mask,
        block=np.repeat(first + rows, masked.valid.sum(axis=1)),
    )


def _columns(models: list[PreTrainedModel], batch: _Batch, vocabulary: Vocabulary) -> dict[str, npt.NDArray[Any]]:
    """One value a position and column; the first model is the student, the second its teacher."""
    features = [_head_input(model, batch) for model in models]
    chunks: list[dict[str, Tensor]] = []
    for start in range(0, len(batch.labels), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        log_probs = [
            _log_probs(model, features_NH[chunk], vocabulary.size)
            for model, features_NH in zip(models, features, strict=True)
        ]
        chunks.append(_compare(log_probs, batch.labels[chunk]))
    names = chunks[0] if chunks else {}
    found = {name: torch.cat([piece[name] for piece in chunks]).double().numpy() for name in names}
    return {"label": batch.labels.numpy(), "at_mask": batch.at_mask, "block": batch.block, **found}


def _head_input(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """What the model's LM head gives to its decoder at the N chosen positions: [N, H]."""
    device = model.device
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    hidden_BMD = hidden_rows(model, batch.input_ids.to(device), mask, batch.positions.to(device))
    return head_features(model, hidden_BMD[batch.valid.to(device)])


def _log_probs(model: PreTrainedModel, features_nH: Tensor, pieces: int) -> Tensor:
    """Log-probabilities [n, pieces]."""
    weight_VH, bias_V = decoder_of(model)
    logits_nV = F.linear(features_nH, weight_VH[:pieces], bias_V[:pieces])
    return F.log_softmax(logits_nV.float(), dim=-1)


def _compare(log_probs: list[Tensor], labels_n: Tensor) -> dict[str, Tensor]:
    """Per position: loss and hit of each model; with a teacher also KL and agreement. All on the CPU."""
    found: dict[str, Tensor] = {}
    for prefix, log_p_nV in zip(("", TEACHERS), log_probs, strict=False):
        label_n = labels_n.to(log_p_nV.device)
        found[f"{prefix}loss"] = -log_p_nV.gather(1, label_n[:, None]).squeeze(1).cpu()
        found[f"{prefix}hit"] = (log_p_nV.argmax(-1) == label_n).cpu()
    if len(log_probs) == 2:
        student_nV, teacher_nV = log_probs[0], log_probs[1].to(log_probs[0].device)
        found["kl"] = (teacher_nV.exp() * (teacher_nV - student_nV)).sum(-1).cpu()
        found["agree"] = (teacher_nV.argmax(-1) == student_nV.argmax(-1)).cpu()
    return found


def _figures(seen: dict[str, npt.NDArray[Any]]) -> Scores:
    frequent = float(np.bincount(seen["label"]).max() / len(seen["label"]))
    scores: Scores = {
        "blocks": float(len(np.unique(seen["block"]))),
        "positions": float(len(seen["label"])),
        "frequent_top1": frequent,
        **_own_figures(seen, ""),
    }
    if "kl" in seen:
        scores |= _own_figures(seen, TEACHERS)
        scores |= {"kl": float(seen["kl"].mean()), "agreement": float(seen["agree"].mean())}
        if scores["teacher_top1"] > frequent:
            scores["kept"] = (scores["top1"] - frequent) / (scores["teacher_top1"] - frequent)
    return scores | {"by_block": _by_block(seen)}


def _by_block(seen: dict[str, npt.NDArray[Any]]) -> dict[str, list[float]]:
    number = np.unique(seen["block"], return_inverse=True)[1]
    columns = {"hits": "hit", "teacher_hits": "teacher_hit", "kl": "kl"}
    sums = {name: np.bincount(number, weights=seen[column]) for name, column in columns.items() if column in seen}
    return {name: values.tolist() for name, values in ({"positions": np.bincount(number)} | sums).items()}


def block_counts(figures: Scores, name: str) -> npt.NDArray[np.float64]:
    """What each held-out block adds to a mean over positions [1, B, 2], as tasks.interval.against takes it.

    `name` is hits, teacher_hits or kl.
    """
    blocks = figures["by_block"]
    return np.stack([np.array(blocks[name], float), np.array(blocks["positions"], float)], axis=-1)[None]


def _own_figures(seen: dict[str, npt.NDArray[Any]], prefix: str) -> Scores:
    hit, loss = seen[f"{prefix}hit"], float(seen[f"{prefix}loss"].mean())
    figures = {
        "top1": float(hit.mean()),
        "top1_se": clustered_error(hit, seen["block"]),
        "mlm_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 is no longer a float
    }
    if seen["at_mask"].any():
        figures["top1_at_mask"] = float(hit[seen["at_mask"]].mean())
    return {f"{prefix}{name}": value for name, value in figures.items()}


def clustered_error(values: npt.NDArray[Any], cluster: npt.NDArray[Any]) -> float:
    """Standard error of the mean of `values` [N], which hang together inside a cluster (ratio estimator).

    Tokens of one block are no independent draws: the plain sqrt(p (1 - p) / N) would be too small. It is what is left
    where there is only one cluster.
    """
    mean = values.mean()
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=values - mean)
    if len(sums) == 1:
        return float(values.std() / math.sqrt(len(values)))
    return float(math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
