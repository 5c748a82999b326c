"""Data order: a pure function of (train.seed, epoch, ordered manifest), so any rank can ask for any stretch of it.

Shards are shuffled, then rows are shuffled inside a window of a few shards: it streams through a corpus that does not
fit anywhere, and the cursor of a run is one global row number.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class ShuffleWindow(NamedTuple):
    """Parts that are shuffled together: the global rows start..stop-1, all of one epoch."""

    epoch: int
    parts: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)  # by identity: what is remembered of it below is asked for with every micro-batch
class DataOrder:
    """`sizes` are the rows of each part of the manifest, `window` how many parts are shuffled together."""

    sizes: tuple[int, ...]
    window: int
    seed: int

    @cached_property
    def rows(self) -> int:
        """Rows in one epoch."""
        return sum(self.sizes)

    def stretch(self, start: int, stop: int) -> tuple[Indices, Indices, Indices]:
        """Parts, rows and epochs of the global rows start..stop-1; they may run on through several epochs."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.rows)
            take = min(stop - start, self.rows - offset)
            parts, rows = self._within(epoch, offset, offset + take)
            pieces.append((parts, rows, np.full(take, epoch, np.int64)))
            start += take
        parts, rows, epochs = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return parts, rows, epochs

    def window_at(self, row: int) -> ShuffleWindow:
        """The window that a global row lies in."""
        epoch, offset = divmod(row, self.rows)
        windows, starts = _windows(self, epoch)
        number = bisect_right(starts, offset) - 1
        before = epoch * self.rows
        return ShuffleWindow(epoch, windows[number], before + starts[number], before + starts[number + 1])

    def _within(self, epoch: int, start: int, stop: int) -> tuple[Indices, Indices]:
        _, starts = _windows(self, epoch)
        pieces = []
        for number in range(bisect_right(starts, start) - 1, bisect_left(starts, stop)):
            begin, end = starts[number], starts[number + 1]
            pieces.append(_shuffled(self, epoch, number)[:, max(start, begin) - begin : min(stop, end) - begin])
        joined = np.concatenate(pieces, axis=1)
        return joined[0], joined[1]


def _generator(seed: int, *path: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *path])))


@lru_cache(maxsize=4)
def _windows(order: DataOrder, epoch: int) -> tuple[Sequence[tuple[int, ...]], Sequence[int]]:
    """The windows of an epoch, and the row of the epoch that each begins with; one more is where the last ends."""
    shuffled = _generator(order.seed, epoch).permutation(len(order.sizes)).tolist()
    windows = [tuple(shuffled[i : i + order.window]) for i in range(0, len(shuffled), order.window)]
    return windows, list(accumulate((sum(order.sizes[part] for part in parts) for parts in windows), initial=0))


@lru_cache(maxsize=4)
def _shuffled(order: DataOrder, epoch: int, number: int) -> Indices:
    """Part and row of every position of one window, shape [2, rows of the window]."""
    parts = _windows(order, epoch)[0][number]
    part = np.concatenate([np.full(order.sizes[p], p, np.int64) for p in parts])
    row = np.concatenate([np.arange(order.sizes[p], dtype=np.int64) for p in parts])
    return np.stack([part, row])[:, _generator(order.seed, epoch, number + 1).permutation(len(part))]
