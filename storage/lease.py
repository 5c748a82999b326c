"""Leases a training run to one process. A process that finds a newer lease on its run stops.

    lease = Lease.take(store, run_key)     # generation = the previous one + 1
    lease.renew()                          # before each checkpoint; raises if another process took over
    lease.end()                            # the run is complete
    leased_artifacts(store)                # artifacts that unfinished runs read; gc keeps them

The lease covers two failures: a trainer that lost its scheduler and still runs after its replacement has started, and
a `gc` that would delete the inputs of a running training run. Object stores have no common compare-and-set operation,
so the lease is not a lock: two processes may both write for up to one checkpoint interval. That is safe, because the
store separates the data of two writers, and each checkpoint is complete.
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
    """The claim of `holder` (host:pid:random) on the training run `key`."""

    store: Store
    key: str
    generation: int
    holder: str

    @staticmethod
    def take(store: Store, key: str, reads: Iterable[Ref] = ()) -> "Lease":
        """Takes over the run from any earlier holder, and records for `leased_artifacts` what the run reads."""
        previous = store.read_json(layout.lease_path(key)) or {"generation": 0}
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        lease = Lease(store, key, int(previous["generation"]) + 1, holder)
        store.write_json(layout.reads_path(key), {"reads": [[ref.kind, ref.key] for ref in reads]})
        lease._write()
        return lease

    def renew(self) -> None:
        """Updates the time of the lease. Raises FatalError if a newer holder has taken over the run."""
        current = self.store.read_json(layout.lease_path(self.key))
        if current is not None and (int(current["generation"]), current["holder"]) != (self.generation, self.holder):
            raise FatalError(
                f"training run {self.key[:12]} was taken over by {current['holder']}; "
                f"this process ({self.holder}) stops"
            )
        self._write()

    def end(self) -> None:
        """Ends the protection of the artifacts that the run reads. The generation is kept for a later holder."""
        self.store.remove(layout.reads_path(self.key))

    def _write(self) -> None:
        value = {"generation": self.generation, "holder": self.holder, "time": time.time()}
        self.store.write_json(layout.lease_path(self.key), value)


def leased_artifacts(store: Store, seconds: float = WEEK) -> set[tuple[str, str]]:
    """Returns the (kind, key) pairs that unfinished runs read, if a run renewed its lease within the last `seconds`."""
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
