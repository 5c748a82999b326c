"""Bookkeeping cost as a corpus grows: listing, planning, status and submitting over a synthetic corpus of full size.

    python -m tests.benchmarks.scale                                    2,000 and 20,000 shards, local disk and S3
    python -m tests.benchmarks.scale --shards 2000 --where local

Needs the project with its extra `test`. Prints a table and writes it into tests/benchmarks/results/.

A synthetic OSCAR-fr: receipts of 20 sources and of all their shards, blocks and targets, with one byte of data each, so
only bookkeeping is measured. Each row is one process that calls the production functions: `status` (distil status),
`nothing to do` (all stages of a run over finished artifacts), `retry list` (missing artifacts, with 200 targets
withdrawn), `submit` (every shard as a job that does nothing, through a Prefect flow). Calls are those of the store to
its file system; on S3 a listing of n objects takes n / 1,000 requests. CPU time is that of the process; for `submit` it
includes a Prefect server. Memory is the process's peak, most of it torch and Prefect. S3 is `rclone serve s3` on
loopback over the same folder: it walks the folder for every page of a listing, so its wall time grows with the square
of the number of shards, unlike that of an object store; the cost of our own code is the CPU time.
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
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tests.benchmarks.paper import make_paper, recipe_of
from tests.benchmarks.results import REPO, RESULTS, Report, facts_of, notes_of, publish
from tests.harness.peak import peak_megabytes

SIZES = (2_000, 20_000)
WITHDRAWN = 200
COUNTED = ("ls", "find", "call_s3", "exists", "info", "cat_file", "pipe_file", "rm_file")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    shards: int
    where: str
    what: str
    seconds: float
    ms_per_shard: float
    cpu_ms_per_shard: float
    calls: int
    peak_mb: float


# ---- measurements, each in a process of its own ----------------------------------------------------------------


def count_calls(store: Store) -> Counter[str]:
    """Counts every later call of the store to its file system, but not the calls that these make in turn."""
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
    rows = {row.stage: row for row in stage_rows(Workspace(store, recipe))}
    assert (rows["targets"].wanted, rows["targets"].done) == (shards, shards)


def nothing_to_do(store: Store, recipe: Recipe, shards: int) -> None:
    assert not prepare_corpus(Workspace(store, recipe)).stages


def retry_list(store: Store, recipe: Recipe, shards: int) -> None:
    lineage = Workspace(store, recipe).lineage
    missing = store.missing([target.ref for target in lineage.targets])
    assert len(missing) == WITHDRAWN


def submit(store: Store, recipe: Recipe, shards: int) -> None:
    """Submits every shard as a job that does nothing, through a real flow and server."""
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    done = []
    jobs = [Job("targets", f"part-{number:05d}", None, partial(_nothing, done, number)) for number in range(shards)]

    @flow(name="scale", persist_result=False)
    def body() -> None:
        assert run_stage("targets", "compute targets", jobs, store, recipe.run, window=4) == []

    with prefect_test_harness(server_startup_timeout=180):
        start = time.perf_counter()
        body()
        spent.append(time.perf_counter() - start)
    assert len(done) == shards


def _nothing(done: list[int], number: int, *, force: bool) -> None:
    done.append(number)


MEASURES = {"status": status, "nothing to do": nothing_to_do, "retry list": retry_list, "submit": submit}
spent: list[float] = []
"""Seconds of a measurement that times itself."""


def measure_here(folder: Path, root: str, what: str, shards: int) -> dict[str, float]:
    """Runs one measurement in this process."""
    recipe = recipe_of(folder, root)
    store = Store(root)
    calls = count_calls(store)
    start, used = time.perf_counter(), time.process_time()
    MEASURES[what](store, recipe, shards)
    seconds = spent[0] if spent else time.perf_counter() - start
    cpu = time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "calls": calls.total(), "peak_mb": peak_megabytes()}


def withdraw_some(folder: Path, root: str) -> None:
    """Withdraws some targets through the store, since an S3 server may cache its listings."""
    store = Store(root)
    for target in Workspace(store, recipe_of(folder, root)).lineage.targets[:WITHDRAWN]:
        store.withdraw(target.ref)


# ---- the table -----------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves the folder `s3/distil` below `folder` as a bucket; yields the address of the store."""
    from tests.harness.servers.s3 import make_endpoint

    endpoint = make_endpoint(folder)
    os.environ |= endpoint.environment
    endpoint.start()
    try:
        yield f"s3://{endpoint.bucket}/store"
    finally:
        endpoint.kill()


def measure(shards: int, wheres: tuple[str, ...]) -> Iterator[Row]:
    """Every row of one corpus size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = folder / "s3" / "distil" / "store"
        make_paper(folder, root, shards)
        for where in wheres:
            with served(folder) if where == "S3" else nullcontext(str(root)) as address:
                for what in MEASURES:
                    if what == "submit" and where == "S3":
                        continue  # does not use the store
                    if what == "retry list":
                        withdraw_some(folder, address)
                    yield _row(folder, address, what, shards, where)
                    if what == "retry list":
                        make_paper(folder, root, shards)  # restores the withdrawn targets


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
    """Measures, prints and writes the table."""
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
            publish(report, given.results)  # after each row, since the last ones take long


if __name__ == "__main__":
    main()
