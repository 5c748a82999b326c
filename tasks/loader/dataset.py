"""Opens the data of a run: the blocks and, with a cache, the teacher targets of each part of its manifest.

    dataset = BlockDataset(store, run.manifest, cached=True, codec=codec)
    dataset.blocks(3), dataset.targets(3, variant=0)      # opened on first use; a remote file is copied first
    dataset.keep({(3, 0), (4, 0)})                        # releases all others, whose local copies may then be evicted

A part is one shard of the manifest. The store verifies the hash of every file before it is read. The number of blocks
must match the manifest, and all targets must have the same codec. The dataset is thread-safe: the first thread that
needs a part opens it, and threads that need other parts do not wait.
"""

import threading
from collections.abc import Callable, Set
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from storage.errors import FatalError
from storage.store import Store
from tasks.recipe.run_json import Part
from tasks.targets.codec import Codec
from tasks.targets.targets_file import TargetRows, open_targets
from tasks.tokens.blocks import Blocks, open_blocks

T = TypeVar("T")

Key = tuple[int, int]
"""Number of the part and mask variant; blocks have no variant and use BLOCKS."""

BLOCKS = -1


class BlockDataset:
    """The files of a manifest's parts, opened on first use.

    `cached`: whether the targets of the parts are read too. `codec`: the codec that decodes them; None: the codec of
    the first targets that are opened.
    """

    def __init__(self, store: Store, parts: tuple[Part, ...], cached: bool, codec: Codec | None = None) -> None:
        self.store, self.parts, self.cached = store, parts, cached
        self._lock = threading.Lock()
        self._opened: dict[Key, Future[Any]] = {}
        # Fingerprint of the codec, and label of the part that it was read from.
        self._codec = (codec.fingerprint, parts[0].label) if codec else ("", "")

    def blocks(self, part: int) -> Blocks:
        """Returns the blocks of one part. FatalError: they are damaged, or their number differs from the manifest."""
        return self._open_once((part, BLOCKS), self._open_blocks)

    def targets(self, part: int, variant: int) -> TargetRows:
        """Returns the targets of one part and mask variant. FatalError: they are damaged or have a different codec."""
        return self._open_once((part, variant), self._open_targets)

    def open(self, part: int, variant: int) -> None:
        """Opens all files that a batch with rows of this part and variant reads."""
        self.blocks(part)
        if self.cached:
            self.targets(part, variant)

    def keep(self, wanted: Set[Key]) -> None:
        """Releases all parts and variants that are not `wanted`.

        Current readers are not affected; a later reader opens the files again.
        """
        parts = {part for part, _ in wanted}
        with self._lock:
            for key in list(self._opened):
                if key[0] not in parts or (key[1] != BLOCKS and key not in wanted):
                    del self._opened[key]

    def _open_once(self, key: Key, open_part: Callable[[Key], T]) -> T:
        """Returns the result of `open_part`, called by the first thread that needs it; after an error the next one
        retries."""
        with self._lock:
            pending = self._opened.get(key)
            own = self._opened.setdefault(key, Future()) if pending is None else None
        if own is None:
            return cast(T, cast(Future[Any], pending).result())
        try:
            opened = open_part(key)
        except BaseException as error:
            with self._lock:
                self._opened.pop(key, None)
            own.set_exception(error)
            raise
        own.set_result(opened)
        return opened

    def _open_blocks(self, key: Key) -> Blocks:
        part = self.parts[key[0]]
        opened = open_blocks(self.store, part.blocks_ref())
        if len(opened) != part.rows:
            raise FatalError(
                f"blocks {part.label} have {len(opened)} rows, but had {part.rows} when this run was planned; run "
                "`distil verify`, then start the run again"
            )
        return opened

    def _open_targets(self, key: Key) -> TargetRows:
        opened = open_targets(self.store, self.parts[key[0]].targets_ref(key[1]))
        with self._lock:
            if not self._codec[0]:
                self._codec = (opened.codec.fingerprint, opened.label)
            fingerprint, label = self._codec
        if opened.codec.fingerprint != fingerprint:
            raise FatalError(
                f"targets {opened.label} have a different encoding from targets {label}; run "
                "`distil verify`, then `distil retry`"
            )
        return opened
