"""The store on a local folder and in memory: receipts, commit order, missing, verify, gc, leases."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import layout
from storage import maintenance as upkeep
from storage.artifact import KINDS, Receipt, Ref
from storage.errors import FatalError, RetryableError
from storage.lease import Lease, leased_artifacts
from storage.maintenance import gc, verify
from storage.store import Store
from tests.harness.artifacts import put, ref_of


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "store")
    else:
        yield Store(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")


def test_what_is_committed_is_there_and_reads_back(store: Store) -> None:
    written = put(store, "a")
    read = store.receipt(ref_of("a"))
    assert read == written
    assert (read.rows, read.tokens, read.size, read.info) == (3, 7, 9, {"n": 2})
    assert (store.check(read) / "blocks.arrow").read_bytes() == b"bytes"
    assert (store.local(read) / "inner" / "more.txt").read_bytes() == b"more"


def test_missing_keeps_the_order_and_leaves_out_what_is_done(store: Store) -> None:
    put(store, "b")
    refs = [ref_of("c"), ref_of("b"), ref_of("a")]
    assert store.missing(refs) == [refs[0], refs[2]]
    assert store.missing([]) == []


def test_receipts_of_what_is_there_come_in_the_order_asked(store: Store) -> None:
    for name in "abcdef":
        put(store, name)
    store.withdraw(ref_of("d"))
    found = store.receipts_of(ref_of(name) for name in "fgeda")
    assert [receipt.ref for receipt in found] == [ref_of(name) for name in "fea"]
    assert store.receipts_of([]) == []


def test_data_without_a_receipt_does_not_exist(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write", power_cut)
    with pytest.raises(KeyboardInterrupt):
        put(store, "a")
    monkeypatch.undo()
    assert store.find(layout.data_folder("blocks"))
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    with pytest.raises(FatalError, match="not in the store"):
        store.receipt(ref_of("a"))


def test_a_receipt_whose_data_was_deleted_counts_as_missing(store: Store) -> None:
    receipt = put(store, "a")
    store.fs.rm(store.path(layout.key_folder("blocks", receipt.key)), recursive=True)
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    assert not store.has(ref_of("a")), "else whoever makes it again would find it done"


def test_files_deleted_inside_their_folders_count_as_missing(store: Store) -> None:
    put(store, "a")
    for path in store.find(layout.data_folder("blocks")):
        store.remove(path)
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    assert not store.has(ref_of("a"))


def test_verify_looks_at_the_store_and_not_at_copies_of_it(store: Store) -> None:
    receipt = put(store, "a")
    store.check(receipt)  # a remote store is copied into the cache here
    path = store.path(layout.data_path("blocks", receipt.key, receipt.content, "blocks.arrow"))
    store.fs.pipe_file(path, b"BYTES")
    assert [fault.ref.key for fault in verify(store)] == [receipt.key]


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    receipt = put(store, "a")
    (store.local(receipt) / "blocks.arrow").write_bytes(b"BYTES")
    assert (store.check(receipt) / "blocks.arrow").read_bytes() == b"bytes"


def test_two_writers_of_one_key_do_no_harm(store: Store) -> None:
    first = put(store, "a", b"one")
    second = put(store, "a", b"two!")
    assert first.content != second.content
    assert (store.check(store.receipt(ref_of("a"))) / "blocks.arrow").read_bytes() == b"two!"
    assert (store.check(first) / "blocks.arrow").read_bytes() == b"one"


def test_writing_the_same_bytes_again_mends_a_damaged_file(store: Store) -> None:
    receipt = put(store, "a")
    damage(store, receipt)
    put(store, "a")
    assert verify(store) == []


def test_a_failure_is_noted_until_a_success(store: Store) -> None:
    store.fail(ref_of("a"), FatalError("part_1.gz is cut short", "part_1.gz", 12))
    store.fail(ref_of("b"), RetryableError("reset"))
    failures = {failure.label: failure for failure in store.failures("blocks")}
    assert (failures["a"].file, failures["a"].line, failures["a"].retryable) == ("part_1.gz", 12, False)
    assert failures["b"].retryable
    put(store, "a")
    assert [failure.label for failure in store.failures("blocks")] == ["b"]


def damage(store: Store, receipt: Receipt) -> None:
    path = store.path(layout.data_path(receipt.kind, receipt.key, receipt.content, "blocks.arrow"))
    data = bytearray(store.fs.cat_file(path))
    data[0] ^= 1
    store.fs.pipe_file(path, bytes(data))
    shutil.rmtree(store.cache.folder, ignore_errors=True)


def test_verify_names_and_withdraws_exactly_what_is_wrong(store: Store) -> None:
    receipts = {label: put(store, label) for label in "abcd"}
    damage(store, receipts["b"])
    swapped = store.fs.cat_file(store.path(layout.receipt_path("blocks", receipts["a"].key)))
    store.fs.pipe_file(store.path(layout.receipt_path("blocks", receipts["c"].key)), swapped)
    faults = verify(store)
    assert {fault.ref.key for fault in faults} == {receipts["b"].key, receipts["c"].key}
    assert any("blocks.arrow" in fault.reason for fault in faults)
    assert store.missing([ref_of(label) for label in "abcd"]) == [ref_of("b"), ref_of("c")]
    assert verify(store) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "tired")])
def test_verify_names_what_it_cannot_read_goes_on_and_withdraws_nothing_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    receipts = {label: put(store, label) for label in "abc"}
    store.fs.pipe_file(store.path(_data(receipts["a"])), b"other")
    monkeypatch.setattr("storage.filesystem.PAUSES", ())
    opened = store.fs.open

    def refusing(path: str, *more: object, **named: object) -> object:
        if receipts["b"].key in path:
            raise error
        return opened(path, *more, **named)

    monkeypatch.setattr(store.fs, "open", refusing)
    faults = {fault.ref.key: fault.what for fault in verify(store)}
    assert faults == {receipts["a"].key: "damaged", receipts["b"].key: "unread"}
    assert store.missing(ref_of(label) for label in "abc") == [ref_of("a")]


def test_what_is_made_again_while_it_is_looked_at_is_not_withdrawn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fs.pipe_file(store.path(_data(put(store, "a"))), b"other")
    rehash = upkeep._rehash

    def meanwhile(store: Store, receipt: Receipt) -> None:
        try:
            rehash(store, receipt)
        finally:
            put(store, "a", b"made again")

    monkeypatch.setattr(upkeep, "_rehash", meanwhile)
    assert verify(store) == []
    monkeypatch.undo()
    assert store.missing([ref_of("a")]) == []
    assert store.failures("blocks") == []
    assert verify(store) == []


def test_what_goes_between_a_listing_and_a_read_was_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a")
    gone = put(store, "b")
    store.fail(ref_of("c"), FatalError("no"))
    listed = store._names

    def then_removed(folder: str) -> list[str]:
        names = listed(folder)
        store.withdraw(gone.ref)
        store.remove(layout.failure_path("blocks", ref_of("c").key))
        return names

    monkeypatch.setattr(store, "_names", then_removed)
    assert [receipt.ref for receipt in store.receipts("blocks")] == [ref_of("a")]
    assert store.failures("blocks") == []


def test_an_edited_receipt_is_noticed(store: Store) -> None:
    receipt = put(store, "a")
    path = store.path(layout.receipt_path("blocks", receipt.key))
    store.fs.pipe_file(path, store.fs.cat_file(path).replace(b'"rows":3', b'"rows":4'))
    with pytest.raises(FatalError, match="changed after it was written"):
        store.receipt(ref_of("a"))


def test_a_file_of_another_size_is_refused_before_it_is_read(store: Store) -> None:
    receipt = put(store, "a")
    path = store.path(layout.data_path("blocks", receipt.key, receipt.content, "blocks.arrow"))
    store.fs.pipe_file(path, b"short")
    store.fs.pipe_file(path, b"sh")
    shutil.rmtree(store.cache.folder, ignore_errors=True)
    with pytest.raises(FatalError, match=r"blocks\.arrow"):
        store.local(receipt)


def test_gc_is_dry_and_spares_what_is_kept_or_young(store: Store) -> None:
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


def test_gc_drops_bytes_that_a_newer_receipt_replaced(store: Store) -> None:
    old, new = put(store, "a", b"old"), put(store, "a", b"new")
    doomed = gc(store, {("blocks", new.key)}, min_age=-60, delete=True)
    assert all(old.content in path for path in doomed)
    assert len(doomed) == 2
    assert verify(store) == []


def test_gc_spares_what_is_made_again_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    refs = [ref_of("again"), ref_of("dropped")]
    for name in ("again", "dropped"):
        put(store, name)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    first = upkeep._named_content

    def read(*arguments: Any) -> set[tuple[str, str]]:
        if arguments[1] == KINDS[-1]:
            put(store, "again")
        return first(*arguments)

    monkeypatch.setattr(upkeep, "_named_content", read)
    gc(store, set(), delete=True)
    assert store.missing(refs) == refs[1:]
    assert verify(store) == []


def test_scratch_is_gone_afterwards(store: Store) -> None:
    with store.scratch() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_the_newest_holder_of_a_lease_wins_and_the_old_one_notices(store: Store) -> None:
    first = Lease.take(store, "k")
    first.renew()
    second = Lease.take(store, "k")
    second.renew()
    with pytest.raises(FatalError, match="taken over"):
        first.renew()


def test_what_a_run_on_lease_reads_is_known_until_it_is_whole(store: Store) -> None:
    first, second = Lease.take(store, "a", [ref_of("x"), ref_of("y")]), Lease.take(store, "b", [ref_of("z")])
    assert leased_artifacts(store) == {("blocks", ref_of(name).key) for name in "xyz"}
    first.end()
    assert leased_artifacts(store) == {("blocks", ref_of("z").key)}
    assert leased_artifacts(store, seconds=-1) == set()
    second.renew()
    first.end()


def test_notes_are_remembered(store: Store) -> None:
    assert store.recall("hash", "file:///a b/ü") is None
    store.remember("hash", "file:///a b/ü", {"sha256": "0"})
    assert store.recall("hash", "file:///a b/ü") == {"sha256": "0"}


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "a" * 63, "A" * 64])
def test_a_ref_takes_only_keys(key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        Ref("blocks", key, "label")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(FatalError, match="may not be written"):
        put(Store(tmp_path / "store"), "a")


def _data(receipt: Receipt) -> str:
    return layout.data_path("blocks", receipt.key, receipt.content, "blocks.arrow")
