"""A run at full size on paper: what listing, planning, status and submitting cost as a corpus grows.

    python -m tests.benchmarks.scale                                    2,000 and 20,000 shards, local disk and S3
    python -m tests.benchmarks.scale --shards 2000 --where local

Needs the project with its extra `test`. Prints a table and writes it into tests/benchmarks/results/.

A synthetic OSCAR-fr: receipts of 20 sources and of all their shards, blocks and targets, with one byte of data each, so
that only the keeping of books is measured. Each line is a process of its own with the product's functions: `status`
(distil status), `nothing to do` (all stages of a run over what is finished), `retry list` (what is missing, with 200
targets withdrawn), `submit` (every shard as a job that does nothing, through a Prefect flow). Calls are those of the
store to its file system; of S3 a listing of n objects takes n / 1,000 requests. The CPU time is that of the process,
and of `submit` includes a Prefect server in it. The memory is the process's peak, most of it torch and Prefect. S3 is
`rclone serve s3` on loopback, over the same folder: it walks the whole folder for every page of a listing, so that its
seconds grow with the square of the shards, which those of an object store do not; our own share is the CPU time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.inventory import stage_rows
from flows.pipeline.preparation import prepare_corpus
from flows.pipeline.stage import Job, run_stage
from storage.store import Store
from tasks.lineage import trace
from tasks.recipe.config import Recipe
from tests.benchmarks.paper import make_paper, recipe_of
from tests.benchmarks.results import REPO, RESULTS, Report, facts_of, notes_of, publish
from tests.harness.peak import peak_megabytes

SIZES = (2_000, 20_000)
WITHDRAWN = 200
COUNTED = ("ls", "find", "call_s3", "exists", "info", "cat_file", "pipe_file", "rm_file")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    shards: int
    where: str
    what: str
    seconds: float
    ms_a_shard: float
    cpu_ms_a_shard: float
    calls: int
    peak_mb: float


# ---- what is measured, each in a process of its own ------------------------------------------------------------


def count_calls(store: Store) -> Counter[str]:
    """From now on every call of the store to its file system is counted; what those call in turn is not."""
    calls: Counter[str] = Counter()
    inside = threading.local()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            if getattr(inside, "yes", False):
                return call(*given, **named)
            calls[name] += 1
            inside.yes = True
            try:
                return call(*given, **named)
            finally:
                inside.yes = False

        return counted

    for name in filter(partial(hasattr, store.fs), COUNTED):
        setattr(store.fs, name, counting(name, getattr(store.fs, name)))
    return calls


def status(store: Store, recipe: Recipe, shards: int) -> None:
    rows = {row.stage: row for row in stage_rows(store, recipe)}
    assert (rows["targets"].wanted, rows["targets"].done) == (shards, shards)


def nothing_to_do(store: Store, recipe: Recipe, shards: int) -> None:
    assert not prepare_corpus(store, recipe).stages


def retry_list(store: Store, recipe: Recipe, shards: int) -> None:
    lineage = trace(store, recipe)
    missing = store.missing([target.ref for target in lineage.targets])
    assert len(missing) == WITHDRAWN


def submit(store: Store, recipe: Recipe, shards: int) -> None:
    """All shards as jobs that do nothing, through a real flow and server."""
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    done = []
    jobs = [Job("targets", f"part-{number:05d}", None, partial(_nothing, done, number)) for number in range(shards)]

    @flow(name="scale", persist_result=False)
    def body() -> None:
        assert run_stage("targets", "teach", jobs, store, recipe.run, window=4) == []

    with prefect_test_harness(server_startup_timeout=180):
        start = time.perf_counter()
        body()
        spent.append(time.perf_counter() - start)
    assert len(done) == shards


def _nothing(done: list[int], number: int, *, force: bool) -> None:
    done.append(number)


MEASURES = {"status": status, "nothing to do": nothing_to_do, "retry list": retry_list, "submit": submit}
spent: list[float] = []
"""Seconds, where a measure takes its own time."""


def measure_here(folder: Path, root: str, what: str, shards: int) -> dict[str, float]:
    """One measure in this process."""
    recipe = recipe_of(folder, root)
    store = Store(root)
    calls = count_calls(store)
    start, used = time.perf_counter(), time.process_time()
    MEASURES[what](store, recipe, shards)
    seconds = spent[0] if spent else time.perf_counter() - start
    cpu = time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "calls": calls.total(), "peak_mb": peak_megabytes()}


def withdraw_some(folder: Path, root: str) -> None:
    """Takes some of the targets' receipts back, by way of the store: its server may remember what it listed."""
    store = Store(root)
    for target in trace(store, recipe_of(folder, root)).targets[:WITHDRAWN]:
        store.withdraw(target.ref)


# ---- the table -----------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder `s3/distil` below `folder` as a bucket."""
    from tests.harness.s3 import make_endpoint

    endpoint = make_endpoint(folder)
    os.environ |= endpoint.environment
    endpoint.start()
    try:
        yield f"s3://{endpoint.bucket}/store"
    finally:
        endpoint.kill()


def measure(shards: int, wheres: tuple[str, ...]) -> Iterator[Row]:
    """All lines of one size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = folder / "s3" / "distil" / "store"
        make_paper(folder, root, shards)
        for where in wheres:
            with served(folder) if where == "S3" else nullcontext(str(root)) as address:
                for what in MEASURES:
                    if what == "submit" and where == "S3":
                        continue  # it asks the store nothing
                    if what == "retry list":
                        withdraw_some(folder, address)
                    yield _row(folder, address, what, shards, where)
                    if what == "retry list":
                        make_paper(folder, root, shards)  # for the next


def _row(folder: Path, root: str, what: str, shards: int, where: str) -> Row:
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--one", str(folder), root, what, str(shards)]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    found = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.splitlines()[-1]
    )
    each = 1000 / shards
    seconds, cpu, calls, peak = (found[name] for name in ("seconds", "cpu", "calls", "peak_mb"))
    return Row(shards, where, what, seconds, each * seconds, each * cpu, int(calls), peak)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--where", nargs="+", choices=["local", "S3"], default=["local", "S3"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, root, what, shards = given.one
        print(json.dumps(measure_here(Path(folder), root, what, int(shards))))
        return
    rows: list[Row] = []
    report = Report("scale", "Bookkeeping as a corpus grows", facts_of(), rows, notes_of(__doc__))
    for shards in given.shards:
        for row in measure(shards, tuple(given.where)):
            rows.append(row)
            publish(report, given.results)  # a table after each: the last ones take long


if __name__ == "__main__":
    main()
