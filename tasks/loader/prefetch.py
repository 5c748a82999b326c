"""Prefetches parts in training order: opens the next window of parts while the current one is trained on.

    with ReadAhead(dataset, order, last=total_rows, variants=1) as read_ahead:
        read_ahead.move(first, stop)      # batches of the global rows first to stop - 1 are being prepared

BatchLoader calls `move` before each step. Opening a part copies its files from a remote store into the local cache and
hashes them; releasing the parts of earlier windows allows the cache to evict them. The cache needs space for three
windows of train.window_shards parts each: at the border of two windows, the window after them is already open. The
cache exceeds a smaller bound, because entries in use are never evicted.
"""

from concurrent.futures import ThreadPoolExecutor

from tasks.loader.dataset import BlockDataset, Key
from tasks.loader.order import DataOrder, ShuffleWindow


class ReadAhead:
    """Opens the parts of upcoming windows in one background thread; use it as a context manager.

    `last`: number of global rows that are trained on. `variants`: number of mask variants; epochs use them in turn.
    """

    def __init__(self, dataset: BlockDataset, order: DataOrder, last: int, variants: int) -> None:
        self.dataset, self.order, self.last, self.variants = dataset, order, last, variants
        self._windows: list[ShuffleWindow] = []
        self._wanted: set[Key] = set()

    def __enter__(self) -> "ReadAhead":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def move(self, first: int, stop: int) -> None:
        """Sets the global rows in use: opens their windows and the next one, and releases all earlier windows."""
        current = self._windows
        if current and first < current[0].stop and (stop <= current[-1].start or current[-1].stop >= self.last):
            return
        windows = [self.order.window_at(first)]
        while windows[-1].start < stop and windows[-1].stop < self.last:
            windows.append(self.order.window_at(windows[-1].stop))
        self._windows = windows
        wanted = [(part, window.epoch % self.variants) for window in windows for part in window.parts]
        self._wanted = set(wanted)
        self.dataset.keep(self._wanted)
        for key in wanted:
            # Errors are not reported here: the batch that needs the part opens it again and raises them.
            self._pool.submit(self._open, key)

    def _open(self, key: Key) -> None:
        if key in self._wanted:  # not wanted any more if training was faster than this thread
            self.dataset.open(*key)
