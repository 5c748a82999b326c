"""A stage of shard tasks: failures are recorded and stop no other shard; only transient errors are retried."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from prefect import flow, runtime

from flows.pipeline.stage import Job, raise_if_stopped, run_stage
from storage.artifact import Failure, Ref
from storage.errors import FatalError, RetryableError
from storage.fingerprint import key_of
from storage.store import Store
from tasks.recipe.config import RunSettings

pytestmark = pytest.mark.usefixtures("prefect_api")

RUN = RunSettings(retries=2, retry_seconds=0, task_seconds=0)
SHARED = RUN.model_copy(update={"task_seconds": 60.0})


def ref(label: str) -> Ref:
    return Ref("blocks", key_of("test", 1, {"label": label}, []), label)


def job(label: str, work: Callable[..., object]) -> Job:
    return Job("blocks", label, ref(label), work)


def in_a_flow(jobs: list[Job], store: Store, window: int = 2, run: RunSettings = RUN) -> list[Failure]:
    @flow(name="test", persist_result=False)
    def body() -> list[list[Failure]]:
        return [run_stage("blocks", "blocks", jobs, store, run, window)]

    return body()[0]


@pytest.mark.parametrize("run", [RUN, SHARED], ids=["each its own task run", "shared task runs"])
def test_a_failed_shard_stops_no_other(run: RunSettings, tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls: dict[str, int] = {}

    def work(label: str, error: Exception | None, times: int) -> Callable[..., None]:
        def attempt(*, force: bool) -> None:
            calls[label] = calls.get(label, 0) + 1
            if error and calls[label] <= times:
                raise error

        return attempt

    bad = FatalError("line 3 is not JSON", "b.jsonl", 3)
    before = [job(f"before {number}", work(f"before {number}", None, 0)) for number in range(40)]
    jobs = [
        *before,  # so that a mean duration exists, by which the others are grouped
        job("a", work("a", None, 0)),
        job("b", work("b", bad, 9)),
        job("c", work("c", RetryableError("the store did not respond"), 2)),
        job("d", work("d", RetryableError("the store did not respond"), 9)),
        job("e", work("e", KeyError("fault"), 9)),
    ]
    failures = in_a_flow(jobs, store, run=run)
    assert calls == {one.label: 1 for one in before} | {"a": 1, "b": 1, "c": 3, "d": 3, "e": 1}
    assert [failure.label for failure in failures] == ["b", "d", "e"]
    assert (failures[0].file, failures[0].line, failures[0].message) == ("b.jsonl", 3, "line 3 is not JSON")
    assert {failure.label for failure in store.failures("blocks")} == {"b", "c", "d", "e"}


def test_no_more_in_flight_than_the_window(tmp_path: Path) -> None:
    lock = threading.Lock()
    together = threading.Barrier(3, timeout=60)
    in_flight = most = 0

    def work(*, force: bool) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait()  # passes only when three run at once
        with lock:
            in_flight -= 1

    assert in_a_flow([job(str(number), work) for number in range(9)], Store(tmp_path), window=3) == []
    assert most == 3


def test_a_stage_with_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    assert run_stage("blocks", "blocks", [], Store(tmp_path), RUN, 2) == []


def task_run_names(jobs: list[Job], store: Store, run: RunSettings) -> list[str]:
    """Names of the task runs that the jobs became, in the order of their start."""
    names: list[str] = []

    def named(work: Callable[..., object], *, force: bool) -> None:
        names.append(str(runtime.task_run.name))
        work(force=force)

    watched = [replace(one, work=partial(named, one.work)) for one in jobs]
    assert in_a_flow(watched, store, window=1, run=run) == []
    return list(dict.fromkeys(names))


def nothing(*, force: bool) -> None: ...


def test_tiny_shards_share_task_runs_named_after_the_first(tmp_path: Path) -> None:
    jobs = [job(f"part-{number:04d}", nothing) for number in range(100)]
    names = task_run_names(jobs, Store(tmp_path), SHARED)
    # One to measure the duration of a shard; then half of the rest, so that every slot has work to the end.
    assert names[:3] == ["blocks part-0000", "blocks part-0001 +48", "blocks part-0050 +24"]
    assert names[-1] == "blocks part-0099"
    assert len(names) < 12
    assert len(task_run_names(jobs[:5], Store(tmp_path), RUN)) == 5


def test_slow_shards_get_a_task_run_each(tmp_path: Path) -> None:
    def slow(*, force: bool) -> None:
        time.sleep(0.05)

    brief = RUN.model_copy(update={"task_seconds": 0.04})
    assert len(task_run_names([job(str(number), slow) for number in range(6)], Store(tmp_path), brief)) == 6


def test_a_task_run_that_prefect_abandons_is_a_failure_and_the_stage_continues(tmp_path: Path) -> None:
    """The thread ends outside our code: here a job ends it as a crash of Prefect would."""

    class Lost(BaseException): ...

    def crash(*, force: bool) -> None:
        raise Lost

    failures = in_a_flow([job("a", nothing), job("b", crash), job("c", nothing)], Store(tmp_path))
    assert [failure.label for failure in failures] == ["b"]
    assert "before this job started" in failures[0].message


def test_an_interrupted_run_starts_no_further_job(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begun: list[str] = []

    def work(label: str, *, force: bool) -> None:
        begun.append(label)
        if label == "1":
            signal.raise_signal(signal.SIGTERM)  # runs the handler in the main thread, which waits in run_stage
        while True:  # no job ends before the run is stopped, so the window is full
            raise_if_stopped()
            time.sleep(0.01)

    jobs = [job(str(number), partial(work, str(number))) for number in range(50)]
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_a_flow(jobs, store, window=2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert "1" in begun
    assert len(begun) <= 2
    assert store.failures("blocks") == []


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt
