"""Care of a store: `verify` re-hashes what is there, `gc` drops what nothing refers to any more, `free_bytes`
says how much more goes in.

Called by `distil verify`, `gc` and `plan`. None computes anything; what `verify` withdraws, `distil retry`
rebuilds.
"""

import os
import shutil
import time
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from storage import layout
from storage.artifact import KINDS, Fault, Receipt, Ref
from storage.error import DamagedError, DistilError, RetryableError
from storage.fingerprint import sha256_stream
from storage.store import STRAY, Store

DAY = 86_400.0
UNREAD = "unread"


def verify(store: Store, kinds: Iterable[str] = KINDS) -> list[Fault]:
    """Re-hashes every file of every receipt; withdraws the receipt of each artifact that is not whole.

    Returns what was wrong. The reason is noted as that artifact's failure, so that `status` names it. A file too many
    is only named: the artifact is whole, and nobody but its owner knows what that file is. So is what cannot be read:
    a refused key or a tired disk says nothing about the bytes.
    """
    faults = []
    for kind in kinds:
        for fault in store.each(partial(_fault, store, kind), store.receipt_keys(kind)):
            if fault is not None:
                faults.append(fault)
                if fault.withdrawn:
                    store.withdraw(fault.ref)
                    store.fail(fault.ref, DamagedError(fault.reason))
    return faults


def _fault(store: Store, kind: str, key: str) -> Fault | None:
    ref = Ref(kind, key, key[:12])
    try:
        receipt = store.receipt_if_there(ref)
        if receipt is None:
            return None  # gone since the listing
        ref = receipt.ref
        _rehash(store, receipt)
        strays = store.strays(receipt)
    except DamagedError as error:
        return Fault(ref, str(error))
    except DistilError as error:
        return Fault(ref, f"{kind} {ref.label}: {error}", withdrawn=False, what=UNREAD)
    return Fault(ref, f"{kind} {ref.label}: {strays[0]} {STRAY}", withdrawn=False, what="stray") if strays else None


def _rehash(store: Store, receipt: Receipt) -> None:
    """Hashes what the store itself holds, whatever was hashed before, and no copy in the cache.

    DamagedError names the first file that differs. FatalError, RetryableError: one cannot be read.
    """
    folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
    for file in receipt.files:
        path = store.path(f"{folder}/{file.name}")
        try:
            found = store.patiently(partial(_hash_of, store, path, file.sha256))
        except FileNotFoundError as error:
            raise DamagedError(f"{receipt.kind} {receipt.label}: {path} is gone", path) from error
        if found != file.sha256:
            message = f"{receipt.kind} {receipt.label}: the bytes of {path} are not those of its receipt"
            raise DamagedError(message, path)


def _hash_of(store: Store, path: str, wanted: str) -> str:
    """Hex sha256 of a file. RetryableError: another hash than `wanted`, and the file came short."""
    with store.fs.open(path, "rb") as stream:
        found = sha256_stream(stream)
        came, size = stream.tell(), int(store.fs.info(path)["size"])
    if found != wanted and came < size:
        raise RetryableError(f"{path} came with {came:,} of its {size:,} bytes; try again", path)
    return found


def free_bytes(store: Store) -> int | None:
    """What the file system below a local store has free for us; None for an object store, which does not tell."""
    if not store.is_local:
        return None
    folder = Path(store.path("")).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def gc(store: Store, keep: set[tuple[str, str]], *, delete: bool = False, min_age: float = DAY) -> list[str]:
    """Files that neither belong to a kept (kind, key) nor are younger than `min_age` seconds, as paths in the store.

    With `delete` they are removed: receipts first, so that nothing half-deleted counts as done. Old work in progress
    and data that a newer receipt of the same key no longer names are dropped too.
    """
    before = time.time() - min_age
    doomed = []
    for kind in KINDS:
        named = _named_content(store, kind, keep)
        for path, detail in store.find(layout.receipts_folder(kind)).items():
            key = path.rsplit("/", 1)[-1].split(".", 1)[0]
            if (kind, key) not in keep and _age_known_and_older(detail, before):
                doomed.append(path)
        for path, detail in store.find(layout.data_folder(kind)).items():
            key, content = path.split("/")[2:4]
            if (key, content) not in named and _age_known_and_older(detail, before):
                doomed.append(path)
    # On this machine, also of a remote store.
    files = (Path(place, name) for place, _, names in os.walk(store.scratch_folder) for name in names)
    work = [path for path in files if _is_older(path, before)]
    if delete:
        receipts = [path for path in doomed if path.startswith("receipts/")]
        for part in (receipts, sorted(set(doomed) - set(receipts))):
            store.remove_all(part)
        for file in work:
            file.unlink(missing_ok=True)
    return doomed + [os.fspath(file) for file in work]


def _named_content(store: Store, kind: str, keep: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(key, content) pairs that a kept receipt names."""
    kept = [key for key in store.receipt_keys(kind) if (kind, key) in keep]
    return {(one.key, one.content) for one in store.receipts_of(Ref(kind, key, key[:12]) for key in kept)}


def _is_older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:
        return False  # whoever works there has just ended


def _age_known_and_older(detail: dict[str, Any], before: float) -> bool:
    """True if the file is known to be older than `before` (seconds since 1970); of unknown age counts as young."""
    stamp = detail.get("mtime") or detail.get("LastModified") or detail.get("created")
    if isinstance(stamp, datetime):
        stamp = stamp.timestamp()
    return isinstance(stamp, int | float) and stamp < before
