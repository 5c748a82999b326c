"""Checks a remote store that is slow, fails or returns wrong data.

Transient errors are retried with exponential back-off up to a limit, permanent errors are raised at once, and no
incomplete artifact counts as finished.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from storage.arrow import BLOCKS_FILE
from storage.errors import FatalError, RetryableError
from storage.files.filesystem import PAUSES
from storage.store import Store
from storage.verify import verify
from tests.hard.faulty_store.store import (
    ALWAYS,
    Clock,
    Script,
    broken_close,
    deleted_objects_listed,
    each_once,
    forbidden,
    no_bucket,
    reset,
    short,
    short_write,
    slow_down,
    staged,
    stale,
    wrong,
)
from tests.harness.artifacts import put, ref_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = "faulty://bucket/store"


@pytest.fixture
def script() -> "Script":
    with staged() as script:
        yield script


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock of the store with one that records pauses instead of waiting."""
    clock = Clock()
    monkeypatch.setattr("storage.files.filesystem.time", SimpleNamespace(sleep=clock.sleep))
    return clock


@pytest.fixture
def store(script: Script, tmp_path: Path) -> Store:
    return Store(ROOT, cache=tmp_path / "home" / "cache")


def cold(store: Store, tmp_path: Path) -> Store:
    """Returns the same store as another machine opens it, with an empty cache."""
    return Store(store.root, cache=tmp_path / "elsewhere" / "cache")


READS = {
    "reset": lambda clock: reset(3),
    "reset at once": lambda clock: reset(0),
    "short": lambda clock: short(3),
    "empty": lambda clock: short(0),
    "503": lambda clock: slow_down(),
    "hangs": lambda clock: clock.hang(60),
}
WRITES = {
    "reset": lambda clock: reset(),
    "503": lambda clock: slow_down(),
    "hangs": lambda clock: clock.hang(60),
    "fails at its close": lambda clock: broken_close,
    "keeps less": lambda clock: short_write(3),
    "keeps an empty object": lambda clock: short_write(0),
    "keeps nothing": lambda clock: short_write(None),
}
OBJECTS = {"data": "*/blocks.arrow", "receipt": "*.receipt.json"}


@pytest.mark.parametrize("what", OBJECTS)
@pytest.mark.parametrize("fault", READS)
def test_a_read_that_fails_is_tried_again(
    fault: str, what: str, store: Store, script: Script, clock: Clock, tmp_path: Path
) -> None:
    put(store, "a")
    other = cold(store, tmp_path)
    script.add("read", OBJECTS[what], READS[fault](clock), times=2)
    folder = other.verified_folder(other.receipt(ref_of("a")))
    assert (folder / BLOCKS_FILE).read_bytes() == b"bytes"
    assert clock.waited == list(PAUSES)
    assert script.count("read", OBJECTS[what]) == 3


@pytest.mark.parametrize("what", OBJECTS)
@pytest.mark.parametrize("fault", READS)
def test_a_read_that_never_succeeds_ends_with_one_sentence(
    fault: str, what: str, store: Store, script: Script, clock: Clock, tmp_path: Path
) -> None:
    put(store, "a")
    other = cold(store, tmp_path)
    script.add("read", OBJECTS[what], READS[fault](clock), times=ALWAYS)
    with pytest.raises(RetryableError) as caught:
        other.verified_folder(other.receipt(ref_of("a")))
    said(caught.value)
    assert clock.waited == list(PAUSES)
    assert script.count("read", OBJECTS[what]) == 1 + len(PAUSES)
    (fault_found,) = verify(store)
    assert (fault_found.what, fault_found.withdrawn) == ("unread", False)
    script.clear()
    assert other.verified_folder(other.receipt(ref_of("a"))).exists()
    assert verify(store) == []


def test_verify_names_what_it_cannot_withdraw(store: Store, script: Script) -> None:
    """The credentials are read-only."""
    for label in "ab":
        put(store, label)
    script.add("read", OBJECTS["data"], wrong, times=ALWAYS)
    script.add("remove", "*", forbidden, times=ALWAYS)
    faults = verify(store)
    assert [(fault.what, fault.withdrawn) for fault in faults] == [("damaged", False)] * 2
    assert all("could not be marked as missing: the store" in fault.reason for fault in faults)
    assert store.missing([ref_of("a"), ref_of("b")]) == []


@pytest.mark.parametrize("what", OBJECTS)
@pytest.mark.parametrize("fault", WRITES)
def test_a_write_that_fails_is_tried_again(
    fault: str, what: str, store: Store, script: Script, clock: Clock, tmp_path: Path
) -> None:
    script.add("write", OBJECTS[what], WRITES[fault](clock), times=2)
    receipt = put(store, "a")
    assert clock.waited == list(PAUSES)
    assert script.count("write", OBJECTS[what]) == 3
    assert (cold(store, tmp_path).verified_folder(receipt) / BLOCKS_FILE).read_bytes() == b"bytes"
    assert verify(store) == []


@pytest.mark.parametrize("what", OBJECTS)
@pytest.mark.parametrize("fault", WRITES)
def test_a_write_that_never_succeeds_makes_no_artifact(
    fault: str, what: str, store: Store, script: Script, clock: Clock
) -> None:
    script.add("write", OBJECTS[what], WRITES[fault](clock), times=ALWAYS)
    with pytest.raises(RetryableError) as caught:
        put(store, "a")
    said(caught.value)
    assert clock.waited == list(PAUSES)
    script.clear()
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    assert not store.has(ref_of("a"))
    assert verify(store) == []
    put(store, "a")
    assert verify(store) == []


def said(error: Exception) -> None:
    """Checks that the error is one sentence with the address of the store."""
    assert "\n" not in str(error)
    assert "bucket/store" in str(error)


PERMANENT = {
    "403": (forbidden, "denied access.*check the credentials"),
    "no bucket": (no_bucket, "the bucket does not exist"),
}


@pytest.mark.parametrize("fault", PERMANENT)
@pytest.mark.parametrize("op", ["read", "write", "list", "info"])
def test_what_cannot_pass_is_said_at_once(
    op: str, fault: str, store: Store, script: Script, clock: Clock, tmp_path: Path
) -> None:
    put(store, "a")
    other = cold(store, tmp_path)
    calls = {
        "read": lambda: other.verified_folder(other.receipt(ref_of("a"))),
        "write": lambda: put(other, "b"),
        "list": lambda: other.missing([ref_of("a")]),
        "info": lambda: other.has(ref_of("a")),
    }
    act, words = PERMANENT[fault]
    script.clear()
    script.add(op, "*", act, times=ALWAYS)
    with pytest.raises(FatalError, match=words) as caught:
        calls[op]()
    said(caught.value)
    assert clock.waited == []
    assert script.count(op) == 1


def test_other_bytes_are_fetched_once_more_and_then_named(
    store: Store, script: Script, clock: Clock, tmp_path: Path
) -> None:
    put(store, "a")
    other = cold(store, tmp_path)
    script.add("read", OBJECTS["data"], wrong, times=ALWAYS)
    with pytest.raises(FatalError, match=r"blocks a: the sha256 of .*blocks\.arrow differs from the receipt"):
        other.verified_folder(other.receipt(ref_of("a")))
    assert script.count("read", OBJECTS["data"]) == 2
    assert clock.waited == []


def test_a_listing_that_is_behind_costs_work_done_twice_and_no_more(store: Store, script: Script) -> None:
    first = put(store, "a")
    script.add("list", "*/receipts/*", stale)
    assert store.missing([ref_of("a")]) == [ref_of("a")]
    assert store.missing([ref_of("a")]) == []
    assert put(store, "a").files == first.files
    assert verify(store) == []


def test_a_listing_that_shows_what_was_deleted_gives_no_artifact(store: Store, script: Script, tmp_path: Path) -> None:
    put(store, "a")
    store.withdraw(ref_of("a"))
    script.add("list", "*", deleted_objects_listed, times=ALWAYS)
    assert store.missing([ref_of("a")]) == []
    assert not store.has(ref_of("a"))
    with pytest.raises(FatalError, match="blocks a is not in the store"):
        cold(store, tmp_path).receipt(ref_of("a"))


def test_every_object_fails_once_in_every_way_and_all_is_made(store: Store, script: Script, clock: Clock) -> None:
    script.add(
        "write", "*", each_once(reset(), slow_down(), broken_close, short_write(2), short_write(None)), times=ALWAYS
    )
    labels = [f"shard-{number}" for number in range(12)]
    for label in labels:
        put(store, label)
    assert store.missing([ref_of(label) for label in labels]) == []
    assert verify(store) == []
    assert len(clock.waited) >= 2 * len(labels), "each data file and each receipt failed once"
