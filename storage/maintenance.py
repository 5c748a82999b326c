"""Maintenance of a store: re-hashes artifacts, deletes unreferenced files, measures free disk space.

faults = verify(store)                       # `distil verify`; `distil retry` rebuilds what it withdraws
paths = gc(store, keep, delete=False)        # `distil gc`; a dry run
free_bytes(store)                            # `distil plan`
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

BLOCK_BYTES = 4 << 20
"""Bytes per request when `verify` reads a remote file; each parallel read holds one to three blocks in memory."""


def verify(store: Store, kinds: Iterable[str] = KINDS) -> list[Fault]:
    """Re-hashes every file of every receipt, and withdraws each damaged artifact; returns the faults by kind and key.

    The reason is recorded as the artifact's failure, so that `status` shows it. A stray file and an unreadable artifact
    are only reported: the first harms no listed file, and the second may be intact. FatalError, RetryableError: the
    store cannot be listed; nothing was withdrawn.
    """
    listed = [Ref(kind, key, key[:12]) for kind in kinds for key in store.receipt_keys(kind)]
    return [fault for fault in store.parallel_map(partial(_verify_artifact, store), listed) if fault is not None]


def _verify_artifact(store: Store, ref: Ref) -> Fault | None:
    """Checks one artifact, and withdraws it if it is damaged. None if it is intact, or deleted since the listing."""
    receipt = None
    try:
        receipt = store.find_receipt(ref)
        if receipt is None:
            return None
        ref = receipt.ref
        _rehash(store, receipt)
        strays = store.strays(receipt)
    except DamagedError as error:
        return _withdraw(store, Fault(ref, str(error)), receipt)
    except DistilError as error:
        message = str(error).removeprefix(f"{ref.kind} {ref.label}: ")
        return Fault(ref, f"{ref.kind} {ref.label} cannot be read: {message}", withdrawn=False, what="unread")
    if not strays:
        return None
    return Fault(ref, f"{ref.kind} {ref.label}: {strays[0]} {STRAY}", withdrawn=False, what="stray")


def _withdraw(store: Store, fault: Fault, receipt: Receipt | None) -> Fault | None:
    """Withdraws the artifact that was found damaged under this receipt (None: the receipt is damaged), and records why.

    None if it was deleted or made again meanwhile. If the store refuses, the reason says so.
    """
    withdrawn = False
    try:
        if not _is_unchanged(store, fault.ref, receipt):
            return None
        store.withdraw(fault.ref)
        withdrawn = True
        store.fail(fault.ref, DamagedError(fault.reason))
    except DistilError as error:
        what = "the reason could not be recorded" if withdrawn else "it could not be withdrawn"
        return replace(fault, reason=f"{fault.reason}; {what}: {error}", withdrawn=withdrawn)
    return fault


def _is_unchanged(store: Store, ref: Ref, receipt: Receipt | None) -> bool:
    try:
        now = store.find_receipt(ref)
    except DamagedError:
        return True
    return now is not None and now == receipt


def _rehash(store: Store, receipt: Receipt) -> None:
    """Hashes the files in the store itself: neither copies in the cache nor earlier hashes count.

    DamagedError that names the first file that differs.
    """
    folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
    for file in receipt.files:
        path = store.path(f"{folder}/{file.name}")
        try:
            found = store.request(partial(_hash, store, path, file.sha256))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{receipt.kind} {receipt.label}: {path} is gone", path) from error
        if found != file.sha256:
            message = f"{receipt.kind} {receipt.label}: the bytes of {path} are not those of its receipt"
            raise DamagedError(message, path)


def _hash(store: Store, path: str, expected: str) -> str:
    """Hex sha256 of a file. RetryableError if it is not `expected` because bytes are missing from the response."""
    with store.fs.open(path, "rb", block_size=BLOCK_BYTES) as stream:
        found = sha256_stream(stream)
        received, size = stream.tell(), int(store.fs.info(path)["size"])
    if found != expected and received < size:
        raise RetryableError(f"{path} arrived with {received:,} of its {size:,} bytes; try again", path)
    return found


def free_bytes(store: Store) -> int | None:
    """Free bytes of a local store's file system; None for an object store, which does not report them."""
    if not store.is_local:
        return None
    folder = Path(store.path("")).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _still_older(store: Store, paths: Sequence[str], before: float) -> list[str]:
    folders = {"/".join(path.split("/")[:2]) for path in paths}
    details = {path: detail for folder in sorted(folders) for path, detail in store.find(folder).items()}
    return [path for path in paths if path in details and _is_listed_older(details[path], before)]


def gc(store: Store, keep: set[tuple[str, str]], *, delete: bool = False, min_age: float = DAY) -> list[str]:
    """Files that belong to no (kind, key) in `keep` and are older than `min_age` seconds, as paths in the store.

    Includes old work in progress, and data that a newer receipt of the same key no longer names. With `delete` they are
    deleted, receipts first, so that a partly deleted artifact does not count as one.
    """
    before = time.time() - min_age
    receipts, data = [], []
    for kind in KINDS:
        named = _named_content(store, kind, keep)
        for path, detail in store.find(layout.receipts_folder(kind)).items():
            key = path.rsplit("/", 1)[-1].split(".", 1)[0]
            if (kind, key) not in keep and _is_listed_older(detail, before):
                receipts.append(path)
        for path, detail in store.find(layout.data_folder(kind)).items():
            key, content = path.split("/")[2:4]
            if (key, content) not in named and _is_listed_older(detail, before):
                data.append(path)
    # The scratch folder of a remote store is local too.
    files = (Path(parent, name) for parent, _, names in os.walk(store.scratch_folder) for name in names)
    scratch = [path for path in files if _is_older(path, before)]
    if delete:
        # Reading the receipts took time: a file that was written again meanwhile is young now.
        store.remove_all(_still_older(store, receipts, before))
        store.remove_all(_still_older(store, data, before))
        for file in scratch:
            file.unlink(missing_ok=True)
    return [*receipts, *data, *(os.fspath(file) for file in scratch)]


def _named_content(store: Store, kind: str, keep: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(key, content) of the kept receipts of one kind; reads no other receipt."""
    kept = store.receipts_of(Ref(kind, key, key[:12]) for kept_kind, key in keep if kept_kind == kind)
    return {(receipt.key, receipt.content) for receipt in kept}


def _is_older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:
        return False  # its job has just ended


def _is_listed_older(detail: dict[str, Any], before: float) -> bool:
    """True if the listed file is older than `before` (seconds since 1970); an unknown age counts as young."""
    stamp = detail.get("mtime") or detail.get("LastModified") or detail.get("created")
    if isinstance(stamp, datetime):
        stamp = stamp.timestamp()
    return isinstance(stamp, int | float) and stamp < before
