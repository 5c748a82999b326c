"""Masks as a pure function of (mask.seed, blocks key, row, variant): any worker on any machine rebuilds the same ones.

    masked = mask_rows(blocks.key, rows, blocks.input_ids[rows], blocks.lengths[rows], vocabulary, recipe.mask, None, 0)

The random words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
computed here for all rows at once: the stream of a library may change with its version, this one cannot.
Called by tasks.teach and tasks.batch with the same arguments, so teacher and student see the same input.
"""

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.fingerprint import canonical_json
from tasks.recipe.config import MaskSettings
from tasks.tokens.vocabulary import Vocabulary

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""

SMOOTHING = 0.7
"""Rare tokens are masked more often, by count ** -0.7 (the reference's setting)."""

_POSITION_BITS = 13
"""Blocks are at most 8192 long (config.Blocks), so a position fits into the low bits of its sort key."""

_LATE = np.uint64(2**64 - 1)

_CHOICE, _ACTION = 0, 1
"""Streams of a row: which positions, and what happens there."""

Int64s = npt.NDArray[np.int64]

Words = npt.NDArray[np.uint64]
"""Random words of 32 bits, kept in 64 so that products do not overflow."""


class MaskedRows(NamedTuple):
    """A corrupted batch of B rows of L tokens with at most M = ceil(rate L) chosen positions a row.

    input_ids [B, L] what teacher and student read; positions [B, M] ascending, padded with 0; valid [B, M] False on
    that padding; labels [B, M] the original ids, -100 on padding.
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
    """Masks rows [B] of a shard's blocks: input_ids [B, L] as stored, lengths [B].

    Each row gets ceil(rate x length) positions (fewer where less can be masked), never padding or special tokens; of
    these 80 % become the mask token, 10 % stay, 10 % become a random piece. `counts` [vocabulary size] is needed
    for kind "smoothed". ValueError if it is missing.
    """
    ids = input_ids.astype(np.int64)
    length = ids.shape[1]
    key = _stream_key(mask.seed, blocks_key, variant)
    tables = _tables(vocabulary)
    maskable = ~tables.special[ids] & (np.arange(length) < lengths[:, None])
    order = _order(mask, philox_rows(key, rows, _CHOICE, length), ids, counts)
    order |= np.arange(length, dtype=np.uint64)
    order[~maskable] = _LATE

    most = int(masked_count(mask.rate, np.int64(length)))
    wanted = np.minimum(masked_count(mask.rate, lengths), maskable.sum(axis=1))
    valid = np.arange(most) < wanted[:, None]
    first = np.sort(order, axis=1)[:, :most]
    found = (first & np.uint64(2**_POSITION_BITS - 1)).astype(np.int64)
    positions = np.sort(np.where(valid, found, length), axis=1)
    positions[~valid] = 0

    originals = np.take_along_axis(ids, positions, axis=1)
    replaced = _replace(originals, philox_rows(key, rows, _ACTION, 2 * most), vocabulary.mask, tables.ordinary)
    row, column = np.nonzero(valid)
    ids[row, positions[row, column]] = replaced[row, column]
    return MaskedRows(ids, positions, valid, np.where(valid, originals, IGNORE_INDEX))


def row_digests(input_ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> list[bytes]:
    """8 bytes a row that name what the teacher read: blake2b over length and attended ids (uint32, little-endian)."""
    words = input_ids.astype("<u4")
    return [
        hashlib.blake2b(int(length).to_bytes(4, "little") + row[:length].tobytes(), digest_size=8).digest()
        for row, length in zip(words, lengths, strict=True)
    ]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four words of 32 bits for each 128-bit counter (four arrays of one shape) under a 64-bit key."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (right >> shift) ^ c1 ^ np.uint64(k0),
            right & low,
            (left >> shift) ^ c3 ^ np.uint64(k1),
            left & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def philox_rows(key: tuple[int, int], rows: npt.NDArray[Any], stream: int, words: int) -> Words:
    """Random words [B, words] of 32 bits; counter = (index / 4, stream, row, high half of row)."""
    row = rows.astype(np.uint64)[:, None]
    index = np.arange(-(-words // 4), dtype=np.uint64)[None, :]
    shape = (len(rows), index.shape[1])
    parts = (index, np.uint64(stream), row & np.uint64(0xFFFFFFFF), row >> np.uint64(32))
    counter = [np.broadcast_to(part, shape) for part in parts]
    out = philox((counter[0], counter[1], counter[2], counter[3]), key)
    return np.stack(out, axis=2).reshape(len(rows), 4 * shape[1])[:, :words]


class _Tables(NamedTuple):
    special: npt.NDArray[np.bool_]
    ordinary: Int64s


@lru_cache(maxsize=4)
def _tables(vocabulary: Vocabulary) -> _Tables:
    special = np.zeros(vocabulary.size, dtype=np.bool_)
    special[list(vocabulary.specials)] = True
    return _Tables(special, np.flatnonzero(~special))


def _stream_key(seed: int, blocks_key: str, variant: int) -> tuple[int, int]:
    digest = hashlib.sha256(canonical_json({"seed": seed, "blocks": blocks_key, "variant": int(variant)})).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def masked_count(rate: float, lengths: npt.ArrayLike) -> Int64s:
    """Positions that are chosen in rows of these lengths, where so many can be masked."""
    # The tiny step back keeps 0.15 x 20 at 3 whatever the last bit of the product is.
    return np.ceil(rate * np.asarray(lengths) - 1e-9).astype(np.int64)


def _order(mask: MaskSettings, words: Words, ids: Int64s, counts: Int64s | None) -> Words:
    """Sort keys [B, L] with free low bits: the positions with the smallest keys are chosen."""
    if mask.kind == "uniform":
        return words << np.uint64(32)
    if counts is None:
        raise ValueError("smoothed masks need token counts")
    # Drawing without replacement by weight w: the smallest of -log(u) / w (the Gumbel trick in its exponential form).
    # Bits of positive floats sort like the floats; 39 bits of mantissa are more than a word has.
    slowness = np.maximum(counts, 1).astype(np.float64) ** SMOOTHING
    race: npt.NDArray[np.float64] = -np.log((words + 0.5) / 2.0**32) * slowness[ids]
    return race.view(np.uint64) & ~np.uint64(2**_POSITION_BITS - 1)


def _replace(originals: Int64s, words: Words, mask_id: int, ordinary: Int64s) -> Int64s:
    """80 % mask token, 10 % unchanged, 10 % a random piece; two words decide for each position."""
    action, draw = words[:, 0::2], words[:, 1::2]
    random_ids = ordinary[(draw * np.uint64(len(ordinary))) >> np.uint64(32)]
    is_mask = action < np.uint64(round(0.8 * 2**32))
    is_kept = ~is_mask & (action < np.uint64(round(0.9 * 2**32)))
    return np.where(is_mask, mask_id, np.where(is_kept, originals, random_ids))
