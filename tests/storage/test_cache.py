"""The cache of a remote store: bound, eviction, pinning, deletion while it is in use, read-ahead."""

import re
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from storage.arrow import BLOCKS_FILE
from storage.errors import FatalError
from storage.store import Store, reading_ahead
from tests.harness.artifacts import put, ref_of, reopened
from tests.harness.servers.s3 import Endpoint


@pytest.fixture
def store(s3: Endpoint, tmp_path: Path) -> Store:
    return Store(f"s3://{s3.bucket}/store", cache=tmp_path / "home" / "cache")


def with_small_cache(store: Store, limit: int) -> Store:
    """The same store with a cache of `limit` bytes, in one folder for all such stores."""
    return Store(store.root, cache=store.cache.folder.with_name("small"), cache_bytes=limit)


def test_the_cache_is_bounded_and_evicts_least_recently_used_folders(store: Store) -> None:
    receipts = [put(store, str(number), bytes([number]) * 1000) for number in range(10)]
    small = with_small_cache(store, 4 * 1004)
    for number in (0, 1, 2, 0, 3, 4, 5):
        small.local_folder(receipts[number])
        assert sum(entry.size for entry in small.cache.entries()) <= 4 * 1004
    cached = {entry.folder.parent.name for entry in small.cache.entries()}
    assert receipts[5].key in cached
    assert not {receipts[1].key, receipts[2].key} & cached


def test_pinned_folders_are_never_evicted(store: Store) -> None:
    receipts = [put(store, str(number), bytes([number]) * 1000) for number in range(6)]
    small = with_small_cache(store, 1)
    pinned = [small.pin(receipt, check=True) for receipt in receipts[:3]]
    other = with_small_cache(store, 1)  # stands in for another process
    for receipt in receipts[3:]:
        other.local_folder(receipt)
    assert [(one.folder / BLOCKS_FILE).read_bytes()[0] for one in pinned] == [0, 1, 2]
    assert len(list(small.cache.entries())) == 4  # three pinned folders, and the last one
    pinned.clear()
    small.local_folder(receipts[5])
    other.local_folder(receipts[4])
    assert len(list(small.cache.entries())) == 1


def test_the_cache_may_be_deleted_at_any_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), reopened(store)
    download = Store._download
    deleted: list[str] = []

    def disturbed(self: Store, remote: str, path: Path) -> None:
        """Deletes the cache once before a download and once after."""
        if not deleted:
            deleted.append("before")
            shutil.rmtree(self.cache.folder)
        download(self, remote, path)
        if len(deleted) == 1:
            deleted.append("after")
            shutil.rmtree(self.cache.folder)

    monkeypatch.setattr(Store, "_download", disturbed)
    pinned = other.pin(receipt, check=True)
    assert deleted == ["before", "after"]
    with pa.memory_map(str(pinned.folder / BLOCKS_FILE)) as mapped:
        shutil.rmtree(other.cache.folder)
        assert mapped.read() == b"bytes"  # mapped memory stays readable
    with other.pin(receipt) as folder:  # and a later reader copies it again, while `pinned` still exists
        (folder / BLOCKS_FILE).unlink()
        assert (other.local_folder(receipt) / BLOCKS_FILE).read_bytes() == b"bytes"


def test_models_are_never_evicted(store: Store) -> None:
    model = put(store, "model", kind="model")
    small = with_small_cache(store, 1)
    folder = small.local_folder(model)
    for number in range(3):
        small.local_folder(put(store, str(number)))
    assert (folder / BLOCKS_FILE).exists()


def test_a_committed_artifact_is_read_from_the_cache(store: Store, s3: Endpoint) -> None:
    receipt = put(store, "a")
    s3.kill()
    assert (store.verified_folder(receipt) / BLOCKS_FILE).read_bytes() == b"bytes"


def test_a_damaged_copy_is_fetched_again(store: Store) -> None:
    receipt = put(store, "a")
    (store.local_folder(receipt) / BLOCKS_FILE).write_bytes(b"BYTES")
    assert (store.verified_folder(receipt) / BLOCKS_FILE).read_bytes() == b"bytes"


def test_concurrent_readers_download_a_file_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), reopened(store)
    downloads: list[str] = []
    download = Store._download

    def counted(self: Store, remote: str, path: Path) -> None:
        downloads.append(remote)
        download(self, remote, path)

    monkeypatch.setattr(Store, "_download", counted)
    threads = [threading.Thread(target=other.local_folder, args=(receipt,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == len(receipt.files)


def test_reading_ahead_fills_the_cache_and_drops_errors(store: Store) -> None:
    receipt, other = put(store, "a"), reopened(store)
    with reading_ahead(other, receipt.ref):
        assert True  # other work
    (entry,) = other.cache.entries()
    assert entry.folder.parent.name == receipt.key
    with reading_ahead(other, ref_of("nothing")):
        put(store, "b")
    with pytest.raises(FatalError, match="not in the store"):
        other.receipt(ref_of("nothing"))


def test_a_full_disk_names_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, other = put(store, "a"), reopened(store)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(other.fs, "get_file", full)
    with pytest.raises(FatalError, match=re.escape(f"the cache {other.cache.folder} is full")):
        other.local_folder(receipt)
