"""A heartbeat lease on a training run: the newest holder may write checkpoints, an older one notices and stops.

    lease = Lease.take(store, run_key)     # generation = the last one + 1
    lease.renew()                          # before each checkpoint; raises if someone took over

Object stores have no compare-and-set, so this is no lock: it is a generation number that a stale writer can see.
Checkpoints themselves are whole whoever writes them, and the data of two writers never share a name.
"""

import os
import socket
import time
import uuid
from dataclasses import dataclass

from storage import layout
from storage.error import FatalError
from storage.store import Store


@dataclass(frozen=True)
class Lease:
    """Who trains `key` now."""

    store: Store
    key: str
    generation: int
    holder: str

    @staticmethod
    def take(store: Store, key: str) -> "Lease":
        """Takes the run over from whoever had it."""
        before = store.read_json(layout.lease_path(key)) or {"generation": 0}
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        lease = Lease(store, key, int(before["generation"]) + 1, holder)
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

    def _write(self) -> None:
        value = {"generation": self.generation, "holder": self.holder, "time": time.time()}
        self.store.write_json(layout.lease_path(self.key), value)
