"""Draws the mask of each block as a pure function of (mask.seed, blocks key, row, variant).

    masked = mask_rows(blocks.key, rows, blocks.input_ids[rows], blocks.lengths[rows], vocabulary, recipe.mask, None, 0)

Masking follows BERT (Devlin et al., 2019): of the chosen positions, 80 % become the mask token, 10 % become a random
token, and 10 % stay unchanged. Random words are drawn by tasks.tokens.philox, so every worker on every machine draws
the same masks. Teacher capture and the dataloader call `mask_rows` with the same arguments, so teacher and student read
the same input.
"""

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.fingerprint import canonical_json
from tasks.recipe.config import MaskSettings
from tasks.tokens.philox import Words, random_words
from tasks.tokens.vocabulary import Vocabulary

IGNORE_INDEX = -100
"""Label of a position without a cross-entropy loss (the convention of PyTorch and Hugging Face)."""

SMOOTHING = 0.7
"""Smoothed masks choose a token with weight count ** -0.7, so rare tokens are masked more often (as in DistilBERT)."""

_POSITION_BITS = 13
"""Blocks contain at most 8192 tokens (BlockSettings.length), so a position fits into the low bits of its sort key."""

_NEVER = np.uint64(2**64 - 1)
"""Sort key of a position that cannot be masked."""

_CHOICE, _ACTION = 0, 1
"""Philox streams of a row: one chooses the positions, the other decides how each chosen position is replaced."""

Int64s = npt.NDArray[np.int64]


class MaskedRows(NamedTuple):
    """A masked batch of B rows of L tokens with at most M = ceil(rate L) chosen positions per row.

    input_ids [B, L]: the input of teacher and student. positions [B, M]: ascending, padded with 0. valid [B, M]: False
    on that padding. labels [B, M]: the original ids, IGNORE_INDEX on padding.
    """

    input_ids: Int64s
    positions: Int64s
    valid: npt.NDArray[np.bool_]
    labels: Int64s


def mask_rows(
    blocks_key: str,
    rows: npt.NDArray[Any],
    input_ids: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    vocabulary: Vocabulary,
    mask: MaskSettings,
    counts: Int64s | None,
    variant: int,
) -> MaskedRows:
    """Masks rows [B] of a shard's blocks, given their input_ids [B, L] as stored and their lengths [B].

    Chooses ceil(rate x length) positions per row, or fewer if fewer can be masked; never padding or special tokens. 80
    % of the chosen positions become the mask token, 10 % stay, and 10 % become a random ordinary token. `counts`
    [vocabulary size]: token counts, for mask.kind "smoothed" only.

    ValueError: mask.kind is "smoothed" and `counts` is None.
    """
    ids = input_ids.astype(np.int64)
    length = ids.shape[1]
    key = _stream_key(mask.seed, blocks_key, variant)
    tables = _tables(vocabulary)
    maskable = ~tables.special[ids] & (np.arange(length) < lengths[:, None])
    sort_keys = _sort_keys(mask, random_words(key, rows, _CHOICE, length), ids, counts)
    sort_keys |= np.arange(length, dtype=np.uint64)
    sort_keys[~maskable] = _NEVER

    most = int(masked_count(mask.rate, np.int64(length)))
    wanted = np.minimum(masked_count(mask.rate, lengths), maskable.sum(axis=1))
    valid = np.arange(most) < wanted[:, None]
    smallest = np.sort(sort_keys, axis=1)[:, :most]
    chosen = (smallest & np.uint64(2**_POSITION_BITS - 1)).astype(np.int64)
    positions = np.sort(np.where(valid, chosen, length), axis=1)
    positions[~valid] = 0

    originals = np.take_along_axis(ids, positions, axis=1)
    replaced = _replace(originals, random_words(key, rows, _ACTION, 2 * most), vocabulary.mask, tables.ordinary)
    row, column = np.nonzero(valid)
    ids[row, positions[row, column]] = replaced[row, column]
    return MaskedRows(ids, positions, valid, np.where(valid, originals, IGNORE_INDEX))


def row_digests(input_ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> list[bytes]:
    """Returns eight bytes per row that identify the model's input, given by input_ids [B, L] and lengths [B].

    The digest is blake2b over the length and the attended ids, all as little-endian uint32.
    """
    little_endian = input_ids.astype("<u4")
    return [
        hashlib.blake2b(int(length).to_bytes(4, "little") + row[:length].tobytes(), digest_size=8).digest()
        for row, length in zip(little_endian, lengths, strict=True)
    ]


def masked_count(rate: float, lengths: npt.ArrayLike) -> Int64s:
    """Returns how many positions are chosen in rows of these lengths, provided that as many can be masked."""
    # Without the small subtraction, 0.07 x 100 would round up to 8.
    return np.ceil(rate * np.asarray(lengths) - 1e-9).astype(np.int64)


class _Tables(NamedTuple):
    special: npt.NDArray[np.bool_]
    ordinary: Int64s


@lru_cache(maxsize=4)
def _tables(vocabulary: Vocabulary) -> _Tables:
    """Marks the special ids [V] and lists all other ids."""
    special = np.zeros(vocabulary.size, dtype=np.bool_)
    special[list(vocabulary.specials)] = True
    return _Tables(special, np.flatnonzero(~special))


def _stream_key(seed: int, blocks_key: str, variant: int) -> tuple[int, int]:
    digest = hashlib.sha256(canonical_json({"seed": seed, "blocks": blocks_key, "variant": int(variant)})).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _sort_keys(mask: MaskSettings, words: Words, ids: Int64s, counts: Int64s | None) -> Words:
    """Computes sort keys [B, L] with free low bits; the positions with the smallest keys are chosen."""
    if mask.kind == "uniform":
        return words << np.uint64(32)
    if counts is None:
        raise ValueError("smoothed masks need token counts; pass them as `counts`")
    # Weighted sampling without replacement: the smallest values of -log(u) / weight (Efraimidis and Spirakis, 2006).
    # Positive floats sort like their bits; 39 bits of mantissa are more than the 32 bits of a random word.
    inverse_weight = np.maximum(counts, 1).astype(np.float64) ** SMOOTHING
    arrival: npt.NDArray[np.float64] = -np.log((words + 0.5) / 2.0**32) * inverse_weight[ids]
    return arrival.view(np.uint64) & ~np.uint64(2**_POSITION_BITS - 1)


def _replace(originals: Int64s, words: Words, mask_id: int, ordinary: Int64s) -> Int64s:
    """Applies 80 % mask token, 10 % unchanged, 10 % random ordinary token, decided by two random words per position."""
    action, draw = words[:, 0::2], words[:, 1::2]
    random_ids = ordinary[(draw * np.uint64(len(ordinary))) >> np.uint64(32)]
    is_mask = action < np.uint64(round(0.8 * 2**32))
    is_kept = ~is_mask & (action < np.uint64(round(0.9 * 2**32)))
    return np.where(is_mask, mask_id, np.where(is_kept, originals, random_ids))
