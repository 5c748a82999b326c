"""Worker processes: errors keep file and line, a hung process is killed, a dead one is a transient error.

In a flow only transient errors are retried.
"""

import gzip
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.pipeline.process_pool import StoppedError, workers
from flows.pipeline.stage import Job, run_stage
from storage.artifact import Failure
from storage.errors import FatalError, RetryableError
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tasks.recipe.config import CorpusSettings, RunSettings
from tests.harness.programs.jobs import attempts, counted, die, hang, refuse, reset_at_first
from tests.harness.tiny import write_oscar


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_keeps_its_file_and_line() -> None:
    with workers(RunSettings(workers=1)) as pool, pytest.raises(FatalError, match="not JSON") as caught:
        pool.call(60, refuse, "part.jsonl")
    assert (caught.value.file, caught.value.line) == ("part.jsonl", 7)


def test_a_hung_worker_is_ended_and_the_next_call_works(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with workers(RunSettings(workers=1)) as pool:
        with pytest.raises(FatalError, match="took longer than 5 seconds"):
            pool.call(5, hang, str(note))
        assert pool.call(60, len, "four") == 4
    assert not is_alive(int(note.read_text()))


def test_a_worker_that_dies_is_a_retryable_error() -> None:
    with workers(RunSettings(workers=1)) as pool, pytest.raises(RetryableError, match="died"):
        pool.call(60, die)


def test_a_thread_that_waits_for_a_worker_of_a_stopped_pool_gets_an_error(tmp_path: Path) -> None:
    heard: list[Exception] = []

    def wait_in_a_thread(pool: Any) -> None:
        try:
            pool.call(600, hang, str(tmp_path / "pid"))
        except StoppedError as error:
            heard.append(error)

    def stop_while_it_hangs() -> None:
        with workers(RunSettings(workers=1)) as pool:
            thread = threading.Thread(target=wait_in_a_thread, args=(pool,))
            thread.start()
            while not (tmp_path / "pid").exists():
                time.sleep(0.05)
            threads.append(thread)
            raise KeyboardInterrupt

    threads: list[threading.Thread] = []
    with pytest.raises(KeyboardInterrupt):
        stop_while_it_hangs()
    threads[0].join(60)
    assert len(heard) == 1


# ---- through a flow ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("prefect_api")
def test_a_network_fault_is_retried_and_a_truncated_or_hung_source_is_not(tmp_path: Path) -> None:
    write_oscar(tmp_path / "corpus", parts=2)
    _, cut = sorted((tmp_path / "corpus").iterdir())
    packed = gzip.compress(cut.read_bytes())
    cut.with_name(cut.name + ".gz").write_bytes(packed[: len(packed) // 2])
    cut.unlink()
    store, corpus = Store(tmp_path / "store"), CorpusSettings(url=str(tmp_path / "corpus"))
    good, bad = take_snapshot(corpus).sources
    notes = {name: tmp_path / name for name in ("whole", "cut", "network", "hung")}
    run = RunSettings(workers=2, retries=2, retry_seconds=0, task_seconds=60)

    @flow(name="test", persist_result=False)
    def body() -> list[list[Failure]]:
        with workers(run) as pool:

            def job(name: str, timeout: float, fn: Callable[..., Any], *arguments: Any) -> Job:
                return Job("source", name, None, partial(pool.call, timeout, counted, notes[name], fn, *arguments))

            jobs = [
                job("whole", 120, shard_source, store, good, corpus),
                job("cut", 120, shard_source, store, bad, corpus),
                job("network", 120, reset_at_first, store, notes["network"]),
                job("hung", 5, hang, str(tmp_path / "pid")),
            ]
            return [run_stage("source", "read", jobs, store, run, window=2)]

    (failures,) = body()
    assert {failure.label: failure.error for failure in failures} == {"cut": "FatalError", "hung": "FatalError"}
    assert {name: attempts(note) for name, note in notes.items()} == {"whole": 1, "cut": 1, "network": 2, "hung": 1}
    assert not is_alive(int((tmp_path / "pid").read_text()))
