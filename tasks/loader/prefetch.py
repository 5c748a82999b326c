"""Reading ahead in the order of training: the next window of parts is opened while this one is trained on.

    ahead = ReadAhead(corpus, order, last=total_rows, variants=1)
    ahead.move(first, stop)      # batches of the global rows first..stop-1 are being made now

Called by tasks.batch.Loader before each step. Opening copies a part of a remote store into the local cache and hashes
it; letting go of what was passed is what allows the cache to evict it. A bound on the cache has to leave room for three
windows (train.window_shards parts each): on the way from one into the next, the one after that is opened already.
Where it is smaller it is exceeded, since nothing in use is ever evicted.
"""

from concurrent.futures import ThreadPoolExecutor

from tasks.loader.dataset import BlockDataset, Key
from tasks.loader.order import DataOrder, ShuffleWindow


class ReadAhead:
    """`last` is the number of global rows that are trained on. Use as a context manager: it owns a thread."""

    def __init__(self, corpus: BlockDataset, order: DataOrder, last: int, variants: int) -> None:
        self.corpus, self.order, self.last, self.variants = corpus, order, last, variants
        self._windows: list[ShuffleWindow] = []
        self._wanted: set[Key] = set()

    def __enter__(self) -> "ReadAhead":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def move(self, first: int, stop: int) -> None:
        """Says which global rows are in work: opens the window behind them, lets go of those before."""
        now = self._windows
        if now and first < now[0].stop and (stop <= now[-1].start or now[-1].stop >= self.last):
            return
        windows = [self.order.window_at(first)]
        while windows[-1].start < stop and windows[-1].stop < self.last:
            windows.append(self.order.window_at(windows[-1].stop))
        self._windows = windows
        wanted = [(part, window.epoch % self.variants) for window in windows for part in window.parts]
        self._wanted = set(wanted)
        self.corpus.keep(self._wanted)
        for key in wanted:
            # Its errors wait for the batch that needs the part: that one tries again, and says what is wrong.
            self._pool.submit(self._open, key)

    def settle(self) -> None:
        """Waits until all that was asked for so far is open, or could not be opened."""
        self._pool.submit(lambda: None).result()

    def _open(self, key: Key) -> None:
        if key in self._wanted:  # else training was faster
            self.corpus.open(*key)
