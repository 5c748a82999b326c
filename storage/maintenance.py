"""Care of a store: `verify` re-hashes what is there, `gc` drops what nothing refers to any more, `free_bytes`
says how much more goes in.

Called by `distil verify`, `gc` and `plan`. None computes anything; what `verify` withdraws, `distil retry`
rebuilds.
"""

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from storage import layout
from storage.artifact import KINDS, Fault, Receipt, Ref
from storage.errors import DamagedError, DistilError, RetryableError
from storage.fingerprint import sha256_stream
from storage.store import STRAY, Store

DAY = 86_400.0

BLOCK = 4 << 20
"""Bytes of a remote file that `verify` asks for at a time; as many as one to three of them are in memory for each of
the store's readers."""


def verify(store: Store, kinds: Iterable[str] = KINDS) -> list[Fault]:
    """Re-hashes every file of every receipt; withdraws the receipt of each artifact that is not whole.

    Returns what was wrong, in the order of kinds and keys. The reason is noted as that artifact's failure, so that
    `status` names it. A file too many is only named: the artifact is whole, and nobody but its owner knows what that
    file is. What cannot be read is only named too: nobody knows whether it is whole. FatalError, RetryableError: the
    store cannot be listed; then nothing was withdrawn.
    """
    listed = [Ref(kind, key, key[:12]) for kind in kinds for key in store.receipt_keys(kind)]
    return [fault for fault in store.each(partial(_look, store), listed) if fault is not None]


def _look(store: Store, ref: Ref) -> Fault | None:
    """Checks one artifact, and withdraws it if it is damaged. None if it is whole, or gone since the listing."""
    receipt = None
    try:
        receipt = store.receipt_if_there(ref)
        if receipt is None:
            return None
        ref = receipt.ref
        _rehash(store, receipt)
        strays = store.strays(receipt)
    except DamagedError as error:
        return _withdraw(store, Fault(ref, str(error)), receipt)
    except DistilError as error:
        said = str(error).removeprefix(f"{ref.kind} {ref.label}: ")
        return Fault(ref, f"{ref.kind} {ref.label} cannot be read: {said}", withdrawn=False, what="unread")
    if not strays:
        return None
    return Fault(ref, f"{ref.kind} {ref.label}: {strays[0]} {STRAY}", withdrawn=False, what="stray")


def _withdraw(store: Store, fault: Fault, receipt: Receipt | None) -> Fault | None:
    """Withdraws what was found damaged under this receipt (None: the receipt itself is), and notes why.

    None if it was dropped or made again meanwhile. What the store refuses is said in the reason.
    """
    withdrawn = False
    try:
        if not _is_as_it_was(store, fault.ref, receipt):
            return None
        store.withdraw(fault.ref)
        withdrawn = True
        store.fail(fault.ref, DamagedError(fault.reason))
    except DistilError as error:
        what = "why could not be noted" if withdrawn else "it could not be withdrawn"
        return replace(fault, reason=f"{fault.reason}; {what}: {error}", withdrawn=withdrawn)
    return fault


def _is_as_it_was(store: Store, ref: Ref, receipt: Receipt | None) -> bool:
    try:
        now = store.receipt_if_there(ref)
    except DamagedError:
        return True
    return now is not None and now == receipt


def _rehash(store: Store, receipt: Receipt) -> None:
    """Hashes what the store itself holds, whatever was hashed before, and no copy in the cache.

    DamagedError names the first file that differs.
    """
    folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
    for file in receipt.files:
        path = store.path(f"{folder}/{file.name}")
        try:
            found = store.patiently(partial(_hash, store, path, file.sha256))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{receipt.kind} {receipt.label}: {path} is gone", path) from error
        if found != file.sha256:
            message = f"{receipt.kind} {receipt.label}: the bytes of {path} are not those of its receipt"
            raise DamagedError(message, path)


def _hash(store: Store, path: str, wanted: str) -> str:
    """Hex sha256 of a file. RetryableError if it is not `wanted` and fewer bytes came than there are."""
    with store.fs.open(path, "rb", block_size=BLOCK) as stream:
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


def _still_older(store: Store, paths: Sequence[str], before: float) -> list[str]:
    folders = {"/".join(path.split("/")[:2]) for path in paths}
    details = {path: detail for folder in sorted(folders) for path, detail in store.find(folder).items()}
    return [path for path in paths if path in details and _age_known_and_older(details[path], before)]


def gc(store: Store, keep: set[tuple[str, str]], *, delete: bool = False, min_age: float = DAY) -> list[str]:
    """Files that neither belong to a kept (kind, key) nor are younger than `min_age` seconds, as paths in the store.

    With `delete` they are removed: receipts first, so that nothing half-deleted counts as done. Old work in progress
    and data that a newer receipt of the same key no longer names are dropped too.
    """
    before = time.time() - min_age
    receipts, data = [], []
    for kind in KINDS:
        named = _named_content(store, kind, keep)
        for path, detail in store.find(layout.receipts_folder(kind)).items():
            key = path.rsplit("/", 1)[-1].split(".", 1)[0]
            if (kind, key) not in keep and _age_known_and_older(detail, before):
                receipts.append(path)
        for path, detail in store.find(layout.data_folder(kind)).items():
            key, content = path.split("/")[2:4]
            if (key, content) not in named and _age_known_and_older(detail, before):
                data.append(path)
    # On this machine, also of a remote store.
    files = (Path(place, name) for place, _, names in os.walk(store.scratch_folder) for name in names)
    work = [path for path in files if _is_older(path, before)]
    if delete:
        # Reading all receipts took its time: what was made again meanwhile, under the same name, is young now.
        store.remove_all(_still_older(store, receipts, before))
        store.remove_all(_still_older(store, data, before))
        for file in work:
            file.unlink(missing_ok=True)
    return [*receipts, *data, *(os.fspath(file) for file in work)]


def _named_content(store: Store, kind: str, keep: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(key, content) pairs that a kept receipt names; reads no other receipt."""
    kept = store.receipts_of(Ref(kind, key, key[:12]) for one, key in keep if one == kind)
    return {(receipt.key, receipt.content) for receipt in kept}


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
