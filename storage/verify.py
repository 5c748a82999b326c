"""Re-hashes the artifacts of a store and withdraws the damaged ones: `distil verify`.

faults = verify(store)              # `distil retry` rebuilds the withdrawn artifacts
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from storage import layout
from storage.artifact import KINDS, Fault, Receipt, Ref
from storage.errors import DamagedError, DistilError, RetryableError
from storage.fingerprint import sha256_stream
from storage.store import STRAY, Store

BLOCK_BYTES = 4 << 20
"""Bytes per request when `verify` reads a remote file; each parallel read keeps one to three blocks in memory."""


def verify(store: Store, kinds: Iterable[str] = KINDS) -> list[Fault]:
    """Re-hashes every file of every receipt and withdraws each damaged artifact. Returns the faults, by kind and key.

    The reason is recorded as the failure of the artifact, so that `status` shows it. Stray files and unreadable
    artifacts are only reported: a stray file does not affect the listed files, and an unreadable one may be intact.

    Raises FatalError or RetryableError if the store cannot be listed; in that case nothing is withdrawn.
    """
    listed = [Ref(kind, key, key[:12]) for kind in kinds for key in store.receipt_keys(kind)]
    return [fault for fault in store.parallel_map(partial(_verify_artifact, store), listed) if fault is not None]


def _verify_artifact(store: Store, ref: Ref) -> Fault | None:
    """Verifies one artifact and withdraws it if it is damaged. Returns None if it is intact or no longer exists."""
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
    """Withdraws a damaged artifact and records the reason. `receipt` is None if the receipt itself is damaged.

    Returns None if the artifact was deleted or rebuilt in the meantime. If the store rejects the request, the reason of
    the returned fault says so.
    """
    withdrawn = False
    try:
        if not _is_unchanged(store, fault.ref, receipt):
            return None
        store.withdraw(fault.ref)
        withdrawn = True
        store.fail(fault.ref, DamagedError(fault.reason))
    except DistilError as error:
        what = "the reason could not be recorded" if withdrawn else "it could not be marked as missing"
        return replace(fault, reason=f"{fault.reason}; {what}: {error}", withdrawn=withdrawn)
    return fault


def _is_unchanged(store: Store, ref: Ref, receipt: Receipt | None) -> bool:
    try:
        now = store.find_receipt(ref)
    except DamagedError:
        return True
    return now is not None and now == receipt


def _rehash(store: Store, receipt: Receipt) -> None:
    """Hashes the files in the store itself, without the cached copies and the hashes of earlier reads.

    Raises DamagedError for the first file that is missing or differs from the receipt.
    """
    folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
    for file in receipt.files:
        path = store.path(f"{folder}/{file.name}")
        try:
            found = store.request(partial(_hash, store, path, file.sha256))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{receipt.kind} {receipt.label}: {path} is missing", path) from error
        if found != file.sha256:
            message = f"{receipt.kind} {receipt.label}: the sha256 of {path} differs from the receipt"
            raise DamagedError(message, path)


def _hash(store: Store, path: str, expected: str) -> str:
    """Returns the hex sha256 of a file. Raises RetryableError if the response was truncated and the hash is wrong."""
    with store.fs.open(path, "rb", block_size=BLOCK_BYTES) as stream:
        found = sha256_stream(stream)
        received, size = stream.tell(), int(store.fs.info(path)["size"])
    if found != expected and received < size:
        raise RetryableError(f"only {received:,} of {size:,} bytes of {path} were received; try again", path)
    return found
