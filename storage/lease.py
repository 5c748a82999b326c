"""A heartbeat lease on a training run: the newest holder may write checkpoints, an older one notices and stops.

    lease = Lease.take(store, run_key)     # generation = the last one + 1
    lease.renew()                          # before each checkpoint; raises if someone took over
    lease.end()                            # the run is whole
    read_on_lease(store)                   # what all runs that go on read, so that gc spares it

Object stores have no compare-and-set, so this is no lock: it is a generation number that a stale writer can see.
Checkpoints themselves are whole whoever writes them, and the data of two writers never share a name.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from storage import layout
from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store

WEEK = 7 * 86_400.0


@dataclass(frozen=True)
class Lease:
    """Who trains `key` now."""

    store: Store
    key: str
    generation: int
    holder: str

    @staticmethod
    def take(store: Store, key: str, reads: Iterable[Ref] = ()) -> "Lease":
        """Takes the run over from whoever had it, and notes what it reads for `read_on_lease`."""
        before = store.read_json(layout.lease_path(key)) or {"generation": 0}
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        lease = Lease(store, key, int(before["generation"]) + 1, holder)
        store.write_json(layout.reads_path(key), {"reads": [[ref.kind, ref.key] for ref in reads]})
        lease._write()
        return lease

    def renew(self) -> None:
        """Says "still here". FatalError if a newer holder took the run over."""
        now = self.store.read_json(layout.lease_path(self.key))
        if now is not None and (int(now["generation"]), now["holder"]) != (self.generation, self.holder):
            raise FatalError(
                f"training run {self.key[:12]} was taken over by {now['holder']}; this process ({self.holder}) stops"
            )
        self._write()

    def end(self) -> None:
        """The run is whole and reads no more. The generation stays."""
        self.store.remove(layout.reads_path(self.key))

    def _write(self) -> None:
        value = {"generation": self.generation, "holder": self.holder, "time": time.time()}
        self.store.write_json(layout.lease_path(self.key), value)


def leased_artifacts(store: Store, seconds: float = WEEK) -> set[tuple[str, str]]:
    """(kind, key) of all that is read by runs that are not whole and had their lease renewed within so many seconds."""
    found: set[tuple[str, str]] = set()
    for path in store.find(layout.leases_folder()):
        name = path.rsplit("/", 1)[-1]
        if not name.endswith(layout.READS):
            continue
        lease = store.read_json(layout.lease_path(name.removesuffix(layout.READS)))
        if lease and time.time() - float(lease["time"]) < seconds:
            reads = store.read_json(path) or {"reads": []}  # the run may have ended at this moment
            found |= {(kind, key) for kind, key in reads["reads"]}
    return found
