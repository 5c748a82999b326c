"""Generates random words from counters (Philox4x32-10), vectorised over numpy arrays.

    words = random_words(key=(seed, 0), rows=np.array([3, 7]), stream=0, count=128)      # [2, 128], below 2**32

The generator is stateless (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a word depends on
its key and counter alone, so any worker can compute any word. numpy's Generator is not used, because its streams may
change between numpy versions (NEP 19), while masks and data order must stay the same.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Random 32-bit words, stored in 64 bits so that products do not overflow."""

ROUNDS = 10


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Returns four 32-bit words for each 128-bit counter (four arrays of equal shape) and a 64-bit key (two
    integers)."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (right >> shift) ^ c1 ^ np.uint64(k0),
            right & low,
            (left >> shift) ^ c3 ^ np.uint64(k1),
            left & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(key: tuple[int, int], rows: npt.NDArray[Any], stream: int, count: int) -> Words:
    """Returns `count` words of a stream for each row [B]: [B, count].

    Word i of a row is word i % 4 of the counter (i // 4, stream, low half of the row, high half of the row).
    """
    row = rows.astype(np.uint64)[:, None]
    index = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    shape = (len(rows), index.shape[1])
    parts = (index, np.uint64(stream), row & np.uint64(0xFFFFFFFF), row >> np.uint64(32))
    c0, c1, c2, c3 = (np.broadcast_to(part, shape) for part in parts)
    words = np.stack(philox4x32((c0, c1, c2, c3), key), axis=2)
    return words.reshape(len(rows), 4 * shape[1])[:, :count]
