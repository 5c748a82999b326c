"""The store on a real S3 endpoint: receipts, listings, verify, gc, leases, large files; and all that can go wrong."""

import os
import re
import shutil
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from storage import layout
from storage.artifact import Receipt
from storage.errors import FatalError, RetryableError
from storage.filesystem import PARALLEL_PARTS, files_below, has_password, open_url
from storage.lease import Lease
from storage.maintenance import gc, verify
from storage.store import Store, reading_ahead
from tests.harness.artifacts import put, ref_of
from tests.harness.s3 import Endpoint


@pytest.fixture
def store(s3: Endpoint, tmp_path: Path) -> Store:
    return Store(f"s3://{s3.bucket}/store", cache=tmp_path / "home" / "cache")


def fresh(store: Store, **options: object) -> Store:
    """The same store as another machine sees it: with a client and a cache of its own."""
    cache = store.cache.folder.with_name(f"cache-{time.monotonic_ns()}")
    return Store(store.root, {"skip_instance_cache": True, **options}, cache=cache)


def object_of(store: Store, receipt: Receipt, name: str = "blocks.arrow") -> str:
    return store.path(layout.data_path(receipt.kind, receipt.key, receipt.content, name))


# ---- listings ----------------------------------------------------------------------------------------------


def test_a_listing_of_many_pages_is_that_of_the_client(store: Store, s3: Endpoint) -> None:
    names = [f"store/data/blocks/{number:04d}/one/blocks.arrow" for number in range(1_100)]  # S3 gives 1,000 at once
    for number, name in enumerate(names):
        s3.path(name).parent.mkdir(parents=True)
        s3.path(name).write_bytes(b"x" * (number % 7))
    found = files_below(store.fs, f"{s3.bucket}/store/data")
    assert sorted(found) == [f"{s3.bucket}/{name}" for name in names]
    theirs = store.fs.find(f"{s3.bucket}/store/data", detail=True)
    assert found == {name: {key: detail[key] for key in ("size", "LastModified")} for name, detail in theirs.items()}
    assert files_below(store.fs, f"{s3.bucket}/store/dat") == {}


# ---- what a store must do ----------------------------------------------------------------------------------


def test_what_is_committed_is_there_for_everybody_at_once(store: Store) -> None:
    other = fresh(store)
    assert other.missing([ref_of("a"), ref_of("b")]) == [ref_of("a"), ref_of("b")]  # a listing that must not stay
    written = put(store, "a")
    assert other.has(ref_of("a"))
    assert other.missing([ref_of("a"), ref_of("b")]) == [ref_of("b")]
    assert other.receipt(ref_of("a")) == written
    assert list(other.receipts("blocks")) == [written]
    folder = other.check(written)
    assert (folder / "blocks.arrow").read_bytes() == b"bytes"
    assert (folder / "inner" / "more.txt").read_bytes() == b"more"
    store.withdraw(ref_of("a"))
    assert not other.has(ref_of("a"))


def test_the_same_key_written_twice_and_at_once_refers_to_whole_files(store: Store) -> None:
    first, second = put(store, "a", b"one"), put(fresh(store), "a", b"two!")
    assert (fresh(store).check(first) / "blocks.arrow").read_bytes() == b"one"
    assert (fresh(store).check(second) / "blocks.arrow").read_bytes() == b"two!"
    assert store.receipt(ref_of("a")) == second
    writers = [threading.Thread(target=put, args=(fresh(store), "b", bytes([n]) * 100_000)) for n in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    other = fresh(store)
    assert len((other.check(other.receipt(ref_of("b"))) / "blocks.arrow").read_bytes()) == 100_000
    assert verify(store) == []


def test_failures_notes_and_leases(store: Store) -> None:
    store.fail(ref_of("a"), RetryableError("reset"))
    assert [failure.message for failure in fresh(store).failures("blocks")] == ["reset"]
    put(store, "a")
    assert fresh(store).failures("blocks") == []
    store.remember("hash", "s3://a b/ü", {"sha256": "0"})
    assert fresh(store).recall("hash", "s3://a b/ü") == {"sha256": "0"}
    assert store.recall("hash", "other") is None
    first = Lease.take(store, "k")
    first.renew()
    second = Lease.take(fresh(store), "k")
    second.renew()
    with pytest.raises(FatalError, match="taken over"):
        first.renew()


def test_verify_finds_what_is_short_wrong_or_gone_on_the_server(store: Store) -> None:
    receipts = {label: put(store, label, label.encode() * 100) for label in "abcd"}
    store.fs.pipe_file(object_of(store, receipts["a"]), b"a" * 50)
    store.fs.pipe_file(object_of(store, receipts["b"]), b"B" * 100)
    store.fs.rm_file(object_of(store, receipts["c"]))
    faults = verify(store)
    assert {fault.ref.label for fault in faults} == {"a", "b", "c"}
    assert all("blocks.arrow" in fault.reason for fault in faults)
    assert store.missing([ref_of(label) for label in "abcd"]) == [ref_of(label) for label in "abc"]
    assert verify(store) == []


def test_verify_reads_a_large_object_part_by_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.filesystem.PART_BYTES", 5 << 20)
    receipt = put(store, "a", os.urandom(12 << 20))
    assert verify(fresh(store)) == []
    data = bytearray(store.fs.cat_file(object_of(store, receipt)))
    data[7 << 20] ^= 1
    store.fs.pipe_file(object_of(store, receipt), bytes(data))
    assert [fault.ref.label for fault in verify(fresh(store))] == ["a"]


def test_a_short_object_is_refused_when_it_is_read(store: Store) -> None:
    receipt = put(store, "a", b"a" * 100)
    store.fs.pipe_file(object_of(store, receipt), b"a" * 50)
    with pytest.raises(FatalError, match=r"blocks\.arrow .* another size .*`distil verify`"):
        fresh(store).local(receipt)


def test_gc_drops_what_nothing_refers_to(store: Store) -> None:
    kept, dropped = put(store, "kept"), put(store, "dropped")
    keep = {("blocks", kept.key)}
    assert gc(store, keep, delete=True) == []  # all of it is young
    doomed = gc(store, keep, min_age=-60, delete=True)
    assert len(doomed) == 3
    assert all(dropped.key in path for path in doomed)
    assert fresh(store).missing([ref_of("dropped"), ref_of("kept")]) == [ref_of("dropped")]
    assert verify(store) == []


def test_a_large_file_goes_and_comes_in_parts_with_bounded_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # the least that S3 takes
    monkeypatch.setattr("storage.filesystem.PART_BYTES", part)
    size = 24 * part + 5
    with store.scratch() as folder:
        with (folder / "big").open("wb") as file:
            file.writelines(os.urandom(part) for _ in range(24))
            file.write(b"ended")
        tracemalloc.start()
        receipt = store.commit(ref_of("big"), folder, schema=1, rows=0, tokens=0, settings={}, parents=[])
        up = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        fresh(store).check(receipt)
        down = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    bound = 4 * PARALLEL_PARTS * part  # the client holds each part two or three times on its way
    assert up < bound < size
    assert down < bound
    assert store.fs.info(object_of(store, receipt, "big"))["size"] == size


def test_an_upload_that_arrives_short_is_no_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is asked for before the receipt is written."""
    monkeypatch.setattr("storage.filesystem.PAUSES", (0.0,))
    monkeypatch.setattr(store.fs, "info", lambda path: {"size": 2})
    with pytest.raises(RetryableError, match="2 bytes after an upload of 5"):
        put(store, "a")
    monkeypatch.undo()
    assert store.missing([ref_of("a")]) == [ref_of("a")]


# ---- what goes wrong ---------------------------------------------------------------------------------------


def calls(store: Store) -> tuple[object, ...]:
    """Everything that talks to a store, as functions without arguments."""
    return (
        lambda: store.missing([ref_of("a")]),
        lambda: store.recall("hash", "x"),
        lambda: put(store, "a"),
        lambda: store.find("data/blocks"),
        lambda: list(store.receipts("blocks")),
        lambda: store.write_json("notes/x.json", {}),
    )


def check_all(store: Store, kind: type[Exception], words: str) -> None:
    for call in calls(store):
        with pytest.raises(kind, match=words) as caught:
            call()  # type: ignore[operator]
        assert store.root in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("credentials", [{"key": "distil", "secret": "wrong"}, {"key": "nobody", "secret": "wrong"}])
def test_wrong_credentials_are_said_once_and_clearly(store: Store, credentials: dict[str, str]) -> None:
    wrong = fresh(store, **credentials)
    check_all(wrong, FatalError, "may not be written or read.*check the credentials in the environment")
    with pytest.raises(FatalError, match="may not be written or read"):
        wrong.has(ref_of("a"))


def test_no_credentials_at_all(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    check_all(fresh(store), FatalError, "needs credentials.*set AWS_ACCESS_KEY_ID")


def test_a_missing_bucket(store: Store) -> None:
    elsewhere = Store("s3://no-such-bucket/store", cache=store.cache.folder)
    check_all(elsewhere, FatalError, "there is no such bucket; create it, or correct the URL")


def test_an_endpoint_that_is_dead(store: Store, s3: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr("storage.filesystem.PAUSES", (0.0,))
    s3.kill()
    check_all(fresh(store), RetryableError, "did not answer: Could not connect")
    s3.start()
    assert put(store, "a") == store.receipt(ref_of("a"))


def test_an_endpoint_that_comes_back_within_seconds_is_waited_for(store: Store, s3: Endpoint) -> None:
    s3.kill()
    late = threading.Timer(1.0, s3.start)
    late.start()
    receipt = put(store, "a")
    late.join()
    assert fresh(store).receipt(ref_of("a")) == receipt


def test_a_server_killed_twice_in_one_upload_gets_a_whole_object(store: Store, s3: Endpoint) -> None:
    with store.scratch() as folder, ThreadPoolExecutor(1) as pool:
        with (folder / "big").open("wb") as file:
            file.writelines(os.urandom(1 << 20) for _ in range(100))
        upload = pool.submit(store.commit, ref_of("big"), folder, schema=1, rows=0, tokens=0, settings={}, parents=[])
        for _ in range(2):
            end = time.monotonic() + 60
            while not any(path.is_file() for path in s3.path("store/data").rglob("*")):
                assert time.monotonic() < end, "the upload does not begin"
                assert not upload.done(), "it ended before the server was killed"
            s3.kill()
            assert not s3.path("store/receipts").exists()
            shutil.rmtree(s3.path("store/data"))  # what the server had of it, so that the next beginning is seen
            s3.start()
        receipt = upload.result()
    assert (fresh(store).check(receipt) / "big").stat().st_size == 100 << 20
    assert verify(store) == []


def test_credentials_come_from_the_environment_only() -> None:
    assert has_password("s3://KEY:SECRET@bucket/x")
    assert has_password("s3://KEY:SEC/RET@bucket/x")
    urls = ("s3://bucket/a:b@c", "hdfs://host:8020/x@y", "/a:b@c", "abfs://box@account.dfs.core.windows.net/x")
    assert not any(has_password(url) for url in urls)
    with pytest.raises(FatalError, match="environment") as caught:
        Store("s3://KEY:SECRET@bucket/x")
    assert "SECRET@" not in str(caught.value)


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("az://box/x", "adlfs")])
def test_a_protocol_without_its_package_names_it(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FatalError, match=f"pip install {package}"):
        open_url(url)


# ---- the cache ---------------------------------------------------------------------------------------------


def test_the_cache_is_bounded_and_evicts_what_was_used_longest_ago(store: Store) -> None:
    receipts = [put(store, str(number), bytes([number]) * 1000) for number in range(10)]
    small = Store(store.root, cache=store.cache.folder.with_name("small"), cache_bytes=4 * 1004)
    for number in (0, 1, 2, 0, 3, 4, 5):
        small.local(receipts[number])
        assert sum(entry.size for entry in small.cache.entries()) <= 4 * 1004
    there = {entry.folder.parent.name for entry in small.cache.entries()}
    assert receipts[5].key in there
    assert not {receipts[1].key, receipts[2].key} & there


def test_what_is_in_use_is_never_evicted_however_small_the_cache(store: Store) -> None:
    receipts = [put(store, str(number), bytes([number]) * 1000) for number in range(6)]
    small = Store(store.root, cache=store.cache.folder.with_name("small"), cache_bytes=1)
    held = [small.pin(receipt, check=True) for receipt in receipts[:3]]
    other = Store(store.root, cache=small.cache.folder, cache_bytes=1)  # as another process on the same folder
    for receipt in receipts[3:]:
        other.local(receipt)
    assert [(one.folder / "blocks.arrow").read_bytes()[0] for one in held] == [0, 1, 2]
    assert len(list(small.cache.entries())) == 4  # three in use, and the last one
    held.clear()
    small.local(receipts[5])
    other.local(receipts[4])
    assert len(list(small.cache.entries())) == 1


def test_the_cache_may_be_deleted_at_any_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), fresh(store)
    download = Store._download
    deleted: list[str] = []

    def disturbed(self: Store, remote: str, path: Path) -> None:
        """Deletes it once before a file comes and once after."""
        if not deleted:
            deleted.append("before")
            shutil.rmtree(self.cache.folder)
        download(self, remote, path)
        if len(deleted) == 1:
            deleted.append("after")
            shutil.rmtree(self.cache.folder)

    monkeypatch.setattr(Store, "_download", disturbed)
    held = other.pin(receipt, check=True)
    assert deleted == ["before", "after"]
    with pa.memory_map(str(held.folder / "blocks.arrow")) as mapped:
        shutil.rmtree(other.cache.folder)
        assert mapped.read() == b"bytes"  # what is mapped stays
    with other.pin(receipt) as folder:  # and what is needed again is copied again, though `held` is still there
        (folder / "blocks.arrow").unlink()
        assert (other.local(receipt) / "blocks.arrow").read_bytes() == b"bytes"


def test_models_stay_since_people_are_pointed_at_them(store: Store) -> None:
    model = put(store, "model", kind="model")
    small = Store(store.root, cache=store.cache.folder.with_name("small"), cache_bytes=1)
    folder = small.local(model)
    for number in range(3):
        small.local(put(store, str(number)))
    assert (folder / "blocks.arrow").exists()


def test_what_was_just_committed_is_not_fetched_again(store: Store, s3: Endpoint) -> None:
    receipt = put(store, "a")
    s3.kill()
    assert (store.check(receipt) / "blocks.arrow").read_bytes() == b"bytes"


def test_a_damaged_copy_is_fetched_again(store: Store) -> None:
    receipt = put(store, "a")
    (store.local(receipt) / "blocks.arrow").write_bytes(b"BYTES")
    assert (store.check(receipt) / "blocks.arrow").read_bytes() == b"bytes"


def test_several_threads_fetch_a_file_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), fresh(store)
    fetched: list[str] = []
    download = Store._download

    def counted(self: Store, remote: str, path: Path) -> None:
        fetched.append(remote)
        download(self, remote, path)

    monkeypatch.setattr(Store, "_download", counted)
    threads = [threading.Thread(target=other.local, args=(receipt,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(receipt.files)


def test_reading_ahead_fetches_meanwhile_and_leaves_errors_to_the_reader(store: Store) -> None:
    receipt, other = put(store, "a"), fresh(store)
    with reading_ahead(other, receipt.ref):
        assert True  # something else is done here
    (entry,) = other.cache.entries()
    assert entry.folder.parent.name == receipt.key
    with reading_ahead(other, ref_of("nothing")):
        put(store, "b")
    with pytest.raises(FatalError, match="not in the store"):
        other.receipt(ref_of("nothing"))


def test_a_full_disk_names_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), fresh(store)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(other.fs, "get_file", full)
    with pytest.raises(FatalError, match=re.escape(f"the cache {other.cache.folder} is full")):
        other.local(receipt)
