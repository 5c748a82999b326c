"""`verify` and `gc` on a local store and on one in memory."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from storage import garbage_collection, layout
from storage import verify as verification
from storage.arrow import BLOCKS_FILE
from storage.artifact import KINDS, Receipt
from storage.garbage_collection import gc
from storage.store import Store
from storage.verify import verify
from tests.harness.artifacts import data_path, put, ref_of
from tests.harness.stores import store

__all__ = ["store"]


def test_verify_reads_the_store_and_not_the_cache(store: Store) -> None:
    receipt = put(store, "a")
    store.verified_folder(receipt)  # a remote store is copied into the cache here
    path = data_path(store, receipt)
    store.fs.pipe_file(path, b"BYTES")
    assert [fault.ref.key for fault in verify(store)] == [receipt.key]


def test_committing_the_same_bytes_again_repairs_a_damaged_file(store: Store) -> None:
    receipt = put(store, "a")
    damage(store, receipt)
    put(store, "a")
    assert verify(store) == []


def damage(store: Store, receipt: Receipt) -> None:
    path = data_path(store, receipt)
    data = bytearray(store.fs.cat_file(path))
    data[0] ^= 1
    store.fs.pipe_file(path, bytes(data))
    shutil.rmtree(store.cache.folder, ignore_errors=True)


def test_verify_reports_and_withdraws_exactly_the_damaged_artifacts(store: Store) -> None:
    receipts = {label: put(store, label) for label in "abcd"}
    damage(store, receipts["b"])
    swapped = store.fs.cat_file(store.path(layout.receipt_path("blocks", receipts["a"].key)))
    store.fs.pipe_file(store.path(layout.receipt_path("blocks", receipts["c"].key)), swapped)
    faults = verify(store)
    assert {fault.ref.key for fault in faults} == {receipts["b"].key, receipts["c"].key}
    assert any(BLOCKS_FILE in fault.reason for fault in faults)
    assert store.missing([ref_of(label) for label in "abcd"]) == [ref_of("b"), ref_of("c")]
    assert verify(store) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "I/O error")])
def test_verify_reports_an_unreadable_artifact_without_withdrawing_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    receipts = {label: put(store, label) for label in "abc"}
    store.fs.pipe_file(data_path(store, receipts["a"]), b"other")
    monkeypatch.setattr("storage.files.filesystem.PAUSES", ())
    real_open = store.fs.open

    def failing_open(path: str, *more: object, **named: object) -> object:
        if receipts["b"].key in path:
            raise error
        return real_open(path, *more, **named)

    monkeypatch.setattr(store.fs, "open", failing_open)
    faults = {fault.ref.key: fault.what for fault in verify(store)}
    assert faults == {receipts["a"].key: "damaged", receipts["b"].key: "unread"}
    assert store.missing(ref_of(label) for label in "abc") == [ref_of("a")]


def test_verify_does_not_withdraw_an_artifact_that_is_made_again_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fs.pipe_file(data_path(store, put(store, "a")), b"other")
    rehash = verification._rehash

    def rehash_then_commit(store: Store, receipt: Receipt) -> None:
        try:
            rehash(store, receipt)
        finally:
            put(store, "a", b"made again")

    monkeypatch.setattr(verification, "_rehash", rehash_then_commit)
    assert verify(store) == []
    monkeypatch.undo()
    assert store.missing([ref_of("a")]) == []
    assert store.failures("blocks") == []
    assert verify(store) == []


def test_gc_is_a_dry_run_by_default_and_keeps_young_or_referenced_files(store: Store) -> None:
    kept, dropped = put(store, "kept"), put(store, "dropped")
    keep = {("blocks", kept.key)}
    assert gc(store, keep, delete=True) == []
    doomed = gc(store, keep, min_age=-60)
    assert doomed
    assert all(dropped.key in path for path in doomed)
    assert store.missing([ref_of("dropped")]) == []
    assert gc(store, keep, delete=True, min_age=-60) == doomed
    assert store.missing([ref_of("dropped"), ref_of("kept")]) == [ref_of("dropped")]
    assert verify(store) == []


def test_gc_deletes_data_that_a_newer_receipt_replaced(store: Store) -> None:
    old, new = put(store, "a", b"old"), put(store, "a", b"new")
    doomed = gc(store, {("blocks", new.key)}, min_age=-60, delete=True)
    assert all(old.content in path for path in doomed)
    assert len(doomed) == 2
    assert verify(store) == []


def test_gc_keeps_an_artifact_that_is_made_again_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    refs = [ref_of("again"), ref_of("dropped")]
    for name in ("again", "dropped"):
        put(store, name)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    real = garbage_collection._named_content

    def commit_then_read(*arguments: Any) -> set[tuple[str, str]]:
        if arguments[1] == KINDS[-1]:
            put(store, "again")
        return real(*arguments)

    monkeypatch.setattr(garbage_collection, "_named_content", commit_then_read)
    gc(store, set(), delete=True)
    assert store.missing(refs) == refs[1:]
    assert verify(store) == []
