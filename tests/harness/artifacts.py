"""A small artifact of two files, for tests of the store: what it holds does not matter.

receipt = put(store, "a")
store.missing([ref_of("a"), ref_of("b")])
"""

from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store


def ref_of(label: str, kind: str = "blocks") -> Ref:
    return Ref(kind, key_of(kind, 1, {"label": label}, []), label)


def put(store: Store, label: str, data: bytes = b"bytes", kind: str = "blocks") -> Receipt:
    """Commits it; `data` goes into its first file."""
    with store.scratch() as folder:
        (folder / "inner").mkdir()
        (folder / "blocks.arrow").write_bytes(data)
        (folder / "inner" / "more.txt").write_bytes(b"more")
        return store.commit(
            ref_of(label, kind), folder, schema=1, rows=3, tokens=7, settings={"a": 1}, parents=["p"], info={"n": 2}
        )
