"""The store on a local folder and in memory: receipts, commit order, missing, failures, leases."""

import os
import shutil
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage import layout
from storage.arrow import BLOCKS_FILE
from storage.artifact import NODE, Failure, Ref
from storage.errors import FatalError, RetryableError
from storage.lease import Lease, leased_artifacts
from storage.store import Store
from tests.harness.artifacts import data_path, put, ref_of
from tests.harness.stores import store

__all__ = ["store"]


def test_a_committed_artifact_reads_back(store: Store) -> None:
    written = put(store, "a")
    read = store.receipt(ref_of("a"))
    assert read == written
    assert (read.rows, read.tokens, read.size, read.info) == (3, 7, 9, {"n": 2})
    assert (store.verified_folder(read) / BLOCKS_FILE).read_bytes() == b"bytes"
    assert (store.local_folder(read) / "inner" / "more.txt").read_bytes() == b"more"


def test_missing_returns_absent_artifacts_in_order(store: Store) -> None:
    put(store, "b")
    refs = [ref_of("c"), ref_of("b"), ref_of("a")]
    assert store.missing(refs) == [refs[0], refs[2]]
    assert store.missing([]) == []


def test_receipts_of_returns_existing_receipts_in_order(store: Store) -> None:
    for name in "abcdef":
        put(store, name)
    store.withdraw(ref_of("d"))
    found = store.receipts_of(ref_of(name) for name in "fgeda")
    assert [receipt.ref for receipt in found] == [ref_of(name) for name in "fea"]
    assert store.receipts_of([]) == []


def test_data_without_a_receipt_is_no_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert not store.has(ref_of("a")), "otherwise a job that rebuilds it would skip it"


def test_files_deleted_inside_their_folders_count_as_missing(store: Store) -> None:
    put(store, "a")
    for path in store.find(layout.data_folder("blocks")):
        store.remove(path)
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    assert not store.has(ref_of("a"))


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    receipt = put(store, "a")
    (store.local_folder(receipt) / BLOCKS_FILE).write_bytes(b"BYTES")
    assert (store.verified_folder(receipt) / BLOCKS_FILE).read_bytes() == b"bytes"


def test_two_writers_of_one_key_both_leave_complete_artifacts(store: Store) -> None:
    first = put(store, "a", b"one")
    second = put(store, "a", b"two!")
    assert first.content != second.content
    assert (store.verified_folder(store.receipt(ref_of("a"))) / BLOCKS_FILE).read_bytes() == b"two!"
    assert (store.verified_folder(first) / BLOCKS_FILE).read_bytes() == b"one"


def test_a_failure_is_recorded_until_a_commit_succeeds(store: Store) -> None:
    store.fail(ref_of("a"), FatalError("part_1.gz is cut short", "part_1.gz", 12))
    store.fail(ref_of("b"), RetryableError("reset"))
    failures = {failure.label: failure for failure in store.failures("blocks")}
    assert (failures["a"].file, failures["a"].line, failures["a"].retryable) == ("part_1.gz", 12, False)
    assert failures["b"].retryable
    put(store, "a")
    assert [failure.label for failure in store.failures("blocks")] == ["b"]


def test_a_failure_is_built_from_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE, "node-1")
    known = Failure.from_error("blocks", "k", "label", RetryableError("reset", "part_1.gz", 12))
    assert (known.error, known.message, known.retryable) == ("RetryableError", "reset", True)
    assert (known.file, known.line, known.host) == ("part_1.gz", 12, "node-1")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(known.created)) < timedelta(minutes=1)
    other = Failure.from_error("source", "", "label", KeyError("x"))
    assert (other.kind, other.key, other.file, other.line, other.retryable) == ("source", "", "", None, True)


def test_receipts_and_failures_deleted_after_the_listing_are_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a")
    gone = put(store, "b")
    store.fail(ref_of("c"), FatalError("no"))
    listed = store._names

    def list_then_delete(folder: str) -> list[str]:
        names = listed(folder)
        store.withdraw(gone.ref)
        store.remove(layout.failure_path("blocks", ref_of("c").key))
        return names

    monkeypatch.setattr(store, "_names", list_then_delete)
    assert [receipt.ref for receipt in store.receipts("blocks")] == [ref_of("a")]
    assert store.failures("blocks") == []


def test_an_edited_receipt_is_detected(store: Store) -> None:
    receipt = put(store, "a")
    path = store.path(layout.receipt_path("blocks", receipt.key))
    store.fs.pipe_file(path, store.fs.cat_file(path).replace(b'"rows":3', b'"rows":4'))
    with pytest.raises(FatalError, match="changed after it was written"):
        store.receipt(ref_of("a"))


def test_a_file_of_another_size_is_refused_before_it_is_read(store: Store) -> None:
    receipt = put(store, "a")
    path = data_path(store, receipt)
    store.fs.pipe_file(path, b"short")
    store.fs.pipe_file(path, b"sh")
    shutil.rmtree(store.cache.folder, ignore_errors=True)
    with pytest.raises(FatalError, match=r"blocks\.arrow"):
        store.local_folder(receipt)


def test_the_scratch_folder_is_deleted_afterwards(store: Store) -> None:
    with store.scratch() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_an_older_lease_holder_stops_when_a_newer_one_takes_over(store: Store) -> None:
    first = Lease.take(store, "k")
    first.renew()
    second = Lease.take(store, "k")
    second.renew()
    with pytest.raises(FatalError, match="taken over"):
        first.renew()


def test_artifacts_that_a_leased_run_reads_are_known_until_it_ends(store: Store) -> None:
    first, second = Lease.take(store, "a", [ref_of("x"), ref_of("y")]), Lease.take(store, "b", [ref_of("z")])
    assert leased_artifacts(store) == {("blocks", ref_of(name).key) for name in "xyz"}
    first.end()
    assert leased_artifacts(store) == {("blocks", ref_of("z").key)}
    assert leased_artifacts(store, seconds=-1) == set()
    second.renew()
    first.end()


def test_a_note_is_recalled_by_its_name(store: Store) -> None:
    assert store.recall("hash", "file:///a b/ü") is None
    store.remember("hash", "file:///a b/ü", {"sha256": "0"})
    assert store.recall("hash", "file:///a b/ü") == {"sha256": "0"}


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "a" * 63, "A" * 64])
def test_a_ref_refuses_an_invalid_key(key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        Ref("blocks", key, "label")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write to any folder")
def test_a_read_only_store_raises_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(FatalError, match="denied access"):
        put(Store(tmp_path / "store"), "a")
