"""The manifest's parts, opened while they are read: blocks and, with cached targets, the teacher's word on them.

    corpus = Corpus(store, run.manifest, cached=True, codec=the_codec_that_decodes)
    corpus.blocks(3), corpus.targets(3, variant=0)      # opened on first use; of a remote store, copied first
    corpus.keep({(3, 0), (4, 0)})                       # lets go of all others, whose copies may then be evicted

Every file is hashed when it is opened (by the store, and again only if it changed since), so before a row of it is
read. Blocks must be as many as the manifest says, and targets encoded for the codec that decodes them. Safe from
several threads: each part is opened once, by whoever needs it first, and nobody waits for another part. Called by
tasks.batch, tasks.ahead and tasks.validate.
"""

import threading
from collections.abc import Callable, Set
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from storage.errors import FatalError
from storage.store import Store
from tasks.recipe.run_spec import Part
from tasks.targets.codec import Codec
from tasks.targets.file import TargetRows, open_targets
from tasks.tokens.blocks import Blocks, open_blocks

T = TypeVar("T")

Key = tuple[int, int]
"""Part and mask variant; blocks have no variant and stand under BLOCKS."""

BLOCKS = -1


class BlockDataset:
    """The parts of a manifest. `cached` says whether their targets are read too, `codec` what decodes these."""

    def __init__(self, store: Store, parts: tuple[Part, ...], cached: bool, codec: Codec | None = None) -> None:
        self.store, self.parts, self.cached = store, parts, cached
        self._lock = threading.Lock()
        self._opened: dict[Key, Future[Any]] = {}
        # Fingerprint, and label of the part that it was taken from.
        self._codec = (codec.fingerprint, parts[0].label) if codec else ("", "")

    def blocks(self, part: int) -> Blocks:
        """Blocks of one part. FatalError if they are damaged or not as many as the manifest says."""
        return self._once((part, BLOCKS), self._open_blocks)

    def targets(self, part: int, variant: int) -> TargetRows:
        """Targets of one part and mask variant. FatalError if they are damaged or another codec has to decode them."""
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

    def _once(self, key: Key, open_it: Callable[[Key], T]) -> T:
        """What `open_it` gives, called by the first thread that asks; after an error the next one tries again."""
        with self._lock:
            found = self._opened.get(key)
            mine = self._opened.setdefault(key, Future()) if found is None else None
        if mine is None:
            return cast(T, cast(Future[Any], found).result())
        try:
            opened = open_it(key)
        except BaseException as error:
            with self._lock:
                self._opened.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(opened)
        return opened

    def _open_blocks(self, key: Key) -> Blocks:
        part = self.parts[key[0]]
        opened = open_blocks(self.store, part.blocks_ref())
        if len(opened) != part.rows:
            raise FatalError(
                f"blocks {part.label} are {len(opened)} rows but were {part.rows} when this run was planned; run "
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
                f"targets {opened.label} are encoded otherwise than those of {label}; run "
                "`distil verify`, then `distil retry`"
            )
        return opened
