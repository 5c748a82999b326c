"""Commits small artifacts of two files with arbitrary content, for tests of the store.

receipt = put(store, "a")
store.missing([ref_of("a"), ref_of("b")])
reopened(store).receipt(ref_of("a"))
"""

import time

from storage import layout
from storage.arrow import BLOCKS_FILE
from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store


def ref_of(label: str, kind: str = "blocks") -> Ref:
    """Returns the reference to the artifact with this label."""
    return Ref(kind, key_of(kind, 1, {"label": label}, []), label)


def put(store: Store, label: str, data: bytes = b"bytes", kind: str = "blocks") -> Receipt:
    """Commits the artifact with this label; `data` is the content of its file BLOCKS_FILE."""
    with store.scratch() as folder:
        (folder / "inner").mkdir()
        (folder / BLOCKS_FILE).write_bytes(data)
        (folder / "inner" / "more.txt").write_bytes(b"more")
        return store.commit(
            ref_of(label, kind), folder, schema=1, rows=3, tokens=7, settings={"a": 1}, parents=["p"], info={"n": 2}
        )


def reopened(store: Store, **options: object) -> Store:
    """Returns the same remote store as another machine opens it: with its own client and its own, empty cache."""
    cache = store.cache.folder.with_name(f"cache-{time.monotonic_ns()}")
    return Store(store.root, {"skip_instance_cache": True, **options}, cache=cache)


def data_path(store: Store, receipt: Receipt, name: str = BLOCKS_FILE) -> str:
    """Returns the path of one file of an artifact in the store's file system."""
    return store.path(f"{layout.content_folder(receipt.kind, receipt.key, receipt.content)}/{name}")
