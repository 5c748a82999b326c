"""The manifest's parts, opened while they are read: blocks and, with cached targets, the teacher's word on them.

    corpus = Corpus(store, run.manifest, cached=True)
    corpus.blocks(3), corpus.targets(3, variant=0)      # opened on first use; of a remote store, copied first
    corpus.keep({(3, 0), (4, 0)})                       # lets go of all others, whose copies may then be evicted

Every file is hashed when it is opened for the first time. Safe from several threads: each part is opened once, by
whoever needs it first, and nobody waits for another part. Called by tasks.batch, tasks.ahead and tasks.validate.
"""

import threading
from collections.abc import Callable, Set
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from storage.error import FatalError
from storage.store import Store
from tasks.block import Blocks, open_blocks
from tasks.run import Part
from tasks.targets import TargetRows, open_targets

T = TypeVar("T")
Key = tuple[int, int]
"""Part and mask variant; blocks have no variant and stand under BLOCKS."""
BLOCKS = -1


class Corpus:
    """The parts of a manifest. `cached` says whether their targets are read too."""

    def __init__(self, store: Store, parts: tuple[Part, ...], cached: bool) -> None:
        self.store, self.parts, self.cached = store, parts, cached
        self._lock = threading.Lock()
        self._opened: dict[Key, Future[Any]] = {}
        self._checked: set[Key] = set()
        self._codec = ("", "")  # fingerprint, and label of the first part that had it

    def blocks(self, part: int) -> Blocks:
        """Blocks of one part."""
        return self._once((part, BLOCKS), self._open_blocks)

    def targets(self, part: int, variant: int) -> TargetRows:
        """Targets of one part and mask variant. FatalError if they are encoded otherwise than those before."""
        return self._once((part, variant), self._open_targets)

    def open(self, part: int, variant: int) -> None:
        """Opens what a batch with rows of this part and variant reads."""
        self.blocks(part)
        if self.cached:
            self.targets(part, variant)

    def keep(self, wanted: Set[Key]) -> None:
        """Lets go of all other parts and variants. Who still reads one keeps it, and who needs one again reopens it."""
        parts = {part for part, _ in wanted}
        with self._lock:
            for key in list(self._opened):
                if key[0] not in parts or (key[1] != BLOCKS and key not in wanted):
                    del self._opened[key]

    def _once(self, key: Key, open_it: Callable[[Key, bool], T]) -> T:
        """What `open_it` gives, called by the first thread that asks; after an error the next one tries again."""
        with self._lock:
            found = self._opened.get(key)
            mine = self._opened.setdefault(key, Future()) if found is None else None
        if mine is None:
            return cast(T, cast(Future[Any], found).result())
        try:
            # A local file that was whole once is not hashed in every epoch; a fresh copy of a remote one is.
            opened = open_it(key, not (self.store.is_local and key in self._checked))
        except BaseException as error:
            with self._lock:
                self._opened.pop(key, None)
            mine.set_exception(error)
            raise
        self._checked.add(key)
        mine.set_result(opened)
        return opened

    def _open_blocks(self, key: Key, check: bool) -> Blocks:
        return open_blocks(self.store, self.parts[key[0]].blocks_ref(), check=check)

    def _open_targets(self, key: Key, check: bool) -> TargetRows:
        opened = open_targets(self.store, self.parts[key[0]].targets_ref(key[1]), check=check)
        with self._lock:
            if not self._codec[0]:
                self._codec = (opened.codec.fingerprint, opened.label)
            fingerprint, label = self._codec
        if opened.codec.fingerprint != fingerprint:
            raise FatalError(
                f"targets {opened.label} are encoded otherwise than those of {label}; run "
                "`distil verify`, then `distil retry`"
            )
        return opened
