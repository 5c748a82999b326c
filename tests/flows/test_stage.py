"""A stage of shard tasks: failures are noted and hold nobody up; only passing errors are tried again."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow

from flows.stage import Job, run_stage
from storage.artifact import Failure, Ref
from storage.error import FatalError, RetryableError
from storage.fingerprint import key_of
from storage.store import Store
from tasks.config import Run

pytestmark = pytest.mark.usefixtures("prefect_api")

RUN = Run(retries=2, retry_seconds=0)


def ref(label: str) -> Ref:
    return Ref("blocks", key_of("test", 1, {"label": label}, []), label)


def job(label: str, work: Callable[..., object]) -> Job:
    return Job("blocks", label, ref(label), work)


def in_a_flow(jobs: list[Job], store: Store, window: int = 2) -> list[Failure]:
    @flow(name="test", persist_result=False)
    def body() -> list[list[Failure]]:
        return [run_stage("blocks", "blocks", jobs, store, RUN, window)]

    return body()[0]


def test_one_bad_shard_stops_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls: dict[str, int] = {}

    def work(label: str, error: Exception | None, times: int) -> Callable[..., None]:
        def run(*, force: bool) -> None:
            calls[label] = calls.get(label, 0) + 1
            if error and calls[label] <= times:
                raise error

        return run

    bad = FatalError("line 3 is not JSON", "b.jsonl", 3)
    jobs = [
        job("a", work("a", None, 0)),
        job("b", work("b", bad, 9)),
        job("c", work("c", RetryableError("the store did not answer"), 2)),
        job("d", work("d", RetryableError("the store did not answer"), 9)),
        job("e", work("e", KeyError("fault"), 9)),
    ]
    failures = in_a_flow(jobs, store)
    assert calls == {"a": 1, "b": 1, "c": 3, "d": 3, "e": 1}
    assert [failure.label for failure in failures] == ["b", "d", "e"]
    assert (failures[0].file, failures[0].line, failures[0].message) == ("b.jsonl", 3, "line 3 is not JSON")
    assert {failure.label for failure in store.failures("blocks")} == {"b", "c", "d", "e"}


def test_no_more_in_flight_than_the_window(tmp_path: Path) -> None:
    lock = threading.Lock()
    together = threading.Barrier(3, timeout=60)
    flying = most = 0

    def work(*, force: bool) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        together.wait()  # passes only when three run at once
        with lock:
            flying -= 1

    assert in_a_flow([job(str(number), work) for number in range(9)], Store(tmp_path), window=3) == []
    assert most == 3


def test_a_stage_with_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    assert run_stage("blocks", "blocks", [], Store(tmp_path), RUN, 2) == []
