"""The store on a real S3 endpoint: receipts, listings, verify, gc, leases, large files, and server errors."""

import os
import shutil
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.arrow import BLOCKS_FILE
from storage.errors import FatalError, RetryableError
from storage.files.filesystem import PARALLEL_PARTS, files_below, has_password, open_url
from storage.garbage_collection import gc
from storage.lease import Lease
from storage.store import Store
from storage.verify import verify
from tests.harness.artifacts import data_path, put, ref_of, reopened
from tests.harness.servers.s3 import Endpoint


@pytest.fixture
def store(s3: Endpoint, tmp_path: Path) -> Store:
    return Store(f"s3://{s3.bucket}/store", cache=tmp_path / "home" / "cache")


# ---- listings ----------------------------------------------------------------------------------------------


def test_a_listing_of_many_pages_equals_that_of_the_client(store: Store, s3: Endpoint) -> None:
    names = [f"store/data/blocks/{number:04d}/one/blocks.arrow" for number in range(1_100)]  # S3 returns 1,000 per page
    for number, name in enumerate(names):
        s3.path(name).parent.mkdir(parents=True)
        s3.path(name).write_bytes(b"x" * (number % 7))
    found = files_below(store.fs, f"{s3.bucket}/store/data")
    assert sorted(found) == [f"{s3.bucket}/{name}" for name in names]
    expected = store.fs.find(f"{s3.bucket}/store/data", detail=True)
    assert found == {name: {key: detail[key] for key in ("size", "LastModified")} for name, detail in expected.items()}
    assert files_below(store.fs, f"{s3.bucket}/store/dat") == {}


# ---- the store ---------------------------------------------------------------------------------------------


def test_a_commit_is_visible_to_other_clients_at_once(store: Store) -> None:
    other = reopened(store)
    assert other.missing([ref_of("a"), ref_of("b")]) == [ref_of("a"), ref_of("b")]  # must not be cached
    written = put(store, "a")
    assert other.has(ref_of("a"))
    assert other.missing([ref_of("a"), ref_of("b")]) == [ref_of("b")]
    assert other.receipt(ref_of("a")) == written
    assert list(other.receipts("blocks")) == [written]
    folder = other.verified_folder(written)
    assert (folder / BLOCKS_FILE).read_bytes() == b"bytes"
    assert (folder / "inner" / "more.txt").read_bytes() == b"more"
    store.withdraw(ref_of("a"))
    assert not other.has(ref_of("a"))


def test_concurrent_writers_of_one_key_leave_complete_artifacts(store: Store) -> None:
    first, second = put(store, "a", b"one"), put(reopened(store), "a", b"two!")
    assert (reopened(store).verified_folder(first) / BLOCKS_FILE).read_bytes() == b"one"
    assert (reopened(store).verified_folder(second) / BLOCKS_FILE).read_bytes() == b"two!"
    assert store.receipt(ref_of("a")) == second
    writers = [threading.Thread(target=put, args=(reopened(store), "b", bytes([n]) * 100_000)) for n in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    other = reopened(store)
    assert len((other.verified_folder(other.receipt(ref_of("b"))) / BLOCKS_FILE).read_bytes()) == 100_000
    assert verify(store) == []


def test_failures_notes_and_leases_are_shared_between_clients(store: Store) -> None:
    store.fail(ref_of("a"), RetryableError("reset"))
    assert [failure.message for failure in reopened(store).failures("blocks")] == ["reset"]
    put(store, "a")
    assert reopened(store).failures("blocks") == []
    store.remember("hash", "s3://a b/ü", {"sha256": "0"})
    assert reopened(store).recall("hash", "s3://a b/ü") == {"sha256": "0"}
    assert store.recall("hash", "other") is None
    first = Lease.take(store, "k")
    first.renew()
    second = Lease.take(reopened(store), "k")
    second.renew()
    with pytest.raises(FatalError, match="taken over"):
        first.renew()


def test_verify_finds_truncated_altered_and_deleted_objects(store: Store) -> None:
    receipts = {label: put(store, label, label.encode() * 100) for label in "abcd"}
    store.fs.pipe_file(data_path(store, receipts["a"]), b"a" * 50)
    store.fs.pipe_file(data_path(store, receipts["b"]), b"B" * 100)
    store.fs.rm_file(data_path(store, receipts["c"]))
    faults = verify(store)
    assert {fault.ref.label for fault in faults} == {"a", "b", "c"}
    assert all(BLOCKS_FILE in fault.reason for fault in faults)
    assert store.missing([ref_of(label) for label in "abcd"]) == [ref_of(label) for label in "abc"]
    assert verify(store) == []


def test_verify_reads_a_large_object_part_by_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.files.filesystem.PART_BYTES", 5 << 20)
    receipt = put(store, "a", os.urandom(12 << 20))
    assert verify(reopened(store)) == []
    data = bytearray(store.fs.cat_file(data_path(store, receipt)))
    data[7 << 20] ^= 1
    store.fs.pipe_file(data_path(store, receipt), bytes(data))
    assert [fault.ref.label for fault in verify(reopened(store))] == ["a"]


def test_a_truncated_object_is_refused_when_it_is_read(store: Store) -> None:
    receipt = put(store, "a", b"a" * 100)
    store.fs.pipe_file(data_path(store, receipt), b"a" * 50)
    with pytest.raises(FatalError, match=r"the size of blocks\.arrow .* differs .*`distil verify`"):
        reopened(store).local_folder(receipt)


def test_gc_deletes_unreferenced_artifacts(store: Store) -> None:
    kept, dropped = put(store, "kept"), put(store, "dropped")
    keep = {("blocks", kept.key)}
    assert gc(store, keep, delete=True) == []  # all files are young
    doomed = gc(store, keep, min_age=-60, delete=True)
    assert len(doomed) == 3
    assert all(dropped.key in path for path in doomed)
    assert reopened(store).missing([ref_of("dropped"), ref_of("kept")]) == [ref_of("dropped")]
    assert verify(store) == []


def test_a_large_file_is_transferred_in_parts_with_bounded_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # the smallest that S3 allows
    monkeypatch.setattr("storage.files.filesystem.PART_BYTES", part)
    size = 24 * part + 5
    with store.scratch() as folder:
        with (folder / "big").open("wb") as file:
            file.writelines(os.urandom(part) for _ in range(24))
            file.write(b"ended")
        tracemalloc.start()
        receipt = store.commit(ref_of("big"), folder, schema=1, rows=0, tokens=0, settings={}, parents=[])
        upload_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        reopened(store).verified_folder(receipt)
        download_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    bound = 4 * PARALLEL_PARTS * part  # the client holds two or three copies of each part
    assert upload_peak < bound < size
    assert download_peak < bound
    assert store.fs.info(data_path(store, receipt, "big"))["size"] == size


def test_a_truncated_upload_makes_no_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is requested before the receipt is written."""
    monkeypatch.setattr("storage.files.filesystem.PAUSES", (0.0,))
    monkeypatch.setattr(store.fs, "info", lambda path: {"size": 2})
    with pytest.raises(RetryableError, match="2 bytes after the upload of 5"):
        put(store, "a")
    monkeypatch.undo()
    assert store.missing([ref_of("a")]) == [ref_of("a")]


# ---- errors ------------------------------------------------------------------------------------------------


def calls(store: Store) -> tuple[object, ...]:
    """Calls that send requests to a store."""
    return (
        lambda: store.missing([ref_of("a")]),
        lambda: store.recall("hash", "x"),
        lambda: put(store, "a"),
        lambda: store.find("data/blocks"),
        lambda: list(store.receipts("blocks")),
        lambda: store.write_json("notes/x.json", {}),
    )


def check_all(store: Store, error: type[Exception], message: str) -> None:
    for call in calls(store):
        with pytest.raises(error, match=message) as caught:
            call()  # type: ignore[operator]
        assert store.root in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("credentials", [{"key": "distil", "secret": "wrong"}, {"key": "nobody", "secret": "wrong"}])
def test_wrong_credentials_raise_one_clear_error(store: Store, credentials: dict[str, str]) -> None:
    wrong = reopened(store, **credentials)
    check_all(wrong, FatalError, "denied access.*check the credentials in the environment")
    with pytest.raises(FatalError, match="denied access"):
        wrong.has(ref_of("a"))


def test_missing_credentials_are_named(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    check_all(reopened(store), FatalError, "needs credentials.*set AWS_ACCESS_KEY_ID")


def test_a_missing_bucket_is_named(store: Store) -> None:
    elsewhere = Store("s3://no-such-bucket/store", cache=store.cache.folder)
    check_all(elsewhere, FatalError, "the bucket does not exist; create it or correct the URL")


def test_a_dead_endpoint_raises_a_retryable_error(store: Store, s3: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr("storage.files.filesystem.PAUSES", (0.0,))
    s3.kill()
    check_all(reopened(store), RetryableError, "did not respond: Could not connect")
    s3.start()
    assert put(store, "a") == store.receipt(ref_of("a"))


def test_an_endpoint_that_returns_within_seconds_is_retried(store: Store, s3: Endpoint) -> None:
    s3.kill()
    restart = threading.Timer(1.0, s3.start)
    restart.start()
    receipt = put(store, "a")
    restart.join()
    assert reopened(store).receipt(ref_of("a")) == receipt


def test_an_upload_survives_two_kills_of_the_server(store: Store, s3: Endpoint) -> None:
    with store.scratch() as folder, ThreadPoolExecutor(1) as pool:
        with (folder / "big").open("wb") as file:
            file.writelines(os.urandom(1 << 20) for _ in range(100))
        upload = pool.submit(store.commit, ref_of("big"), folder, schema=1, rows=0, tokens=0, settings={}, parents=[])
        for _ in range(2):
            end = time.monotonic() + 60
            while not any(path.is_file() for path in s3.path("store/data").rglob("*")):
                assert time.monotonic() < end, "the upload does not start"
                assert not upload.done(), "it ended before the server was killed"
            s3.kill()
            assert not s3.path("store/receipts").exists()
            shutil.rmtree(s3.path("store/data"))  # so that the loop detects the start of the next attempt
            s3.start()
        receipt = upload.result()
    assert (reopened(store).verified_folder(receipt) / "big").stat().st_size == 100 << 20
    assert verify(store) == []


def test_credentials_in_a_url_are_refused() -> None:
    assert has_password("s3://KEY:SECRET@bucket/x")
    assert has_password("s3://KEY:SEC/RET@bucket/x")
    urls = ("s3://bucket/a:b@c", "hdfs://host:8020/x@y", "/a:b@c", "abfs://box@account.dfs.core.windows.net/x")
    assert not any(has_password(url) for url in urls)
    with pytest.raises(FatalError, match="environment") as caught:
        Store("s3://KEY:SECRET@bucket/x")
    assert "SECRET@" not in str(caught.value)


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("az://box/x", "adlfs")])
def test_a_missing_protocol_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FatalError, match=f"pip install {package}"):
        open_url(url)
