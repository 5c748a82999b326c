"""One stage of the chain: named task runs, a few in flight at once, every failure noted and none in the way of others.

    failed = run_stage("blocks", "blocks", jobs, store, recipe.run, window=4)

What to do was asked of the store before; what came out is asked of the store after. Prefect shows, it does not decide.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture

from flows.bind import bound_task
from flows.report import bar
from storage.artifact import Failure, Ref
from storage.error import DistilError
from storage.store import Store, now
from tasks.config import Run

PROGRESS_SECONDS = 5.0
"""The progress artifact is written at most this often: it costs a call to the server."""


@dataclass(frozen=True)
class Job:
    """One artifact to make by `work(force=force)`. `ref` is None while the content of a source is not known yet."""

    stage: str
    label: str
    ref: Ref | None
    work: Callable[..., object]
    force: bool = False


class _Attempt:
    """What a task run calls. A plain object: Prefect looks for futures inside dataclasses and models, at a cost."""

    def __init__(self, store: Store, job: Job) -> None:
        self.store, self.job = store, job

    def __call__(self) -> None:
        try:
            self.job.work(force=self.job.force)
        except Exception as error:
            if self.job.ref is not None:
                self.store.fail(self.job.ref, error)
            raise


def make_one(label: str, attempt: Callable[[], None]) -> None:
    """The body of every shard's task run; `label` names it."""
    attempt()


def run_stage(stage: str, verb: str, jobs: Sequence[Job], store: Store, run: Run, window: int) -> list[Failure]:
    """Runs all jobs, `window` in flight at once, and returns the failures. Never raises for a job's own error."""
    if not jobs:
        return []
    task = bound_task(make_one, verb, run)
    gate = threading.Semaphore(window)
    futures: list[tuple[Job, PrefectFuture[None]]] = []
    with bar(stage, len(jobs)) as advance, _Progress(stage, len(jobs)) as progress:

        def finished(_future: PrefectFuture[None]) -> None:
            gate.release()
            advance(1)
            progress.add()

        for job in jobs:
            gate.acquire()
            progress.tell()
            future = task.submit(job.label, _Attempt(store, job))
            future.add_done_callback(finished)
            futures.append((job, future))
        failures: list[Failure] = []
        for job, future in futures:
            outcome = future.result(raise_on_failure=False)
            progress.tell()
            if isinstance(outcome, BaseException):
                failures.append(_failure(job, outcome))
    return failures


def _failure(job: Job, error: BaseException) -> Failure:
    get_run_logger().error(f"{job.stage} {job.label}: {error}")
    about = error if isinstance(error, DistilError) else DistilError(str(error))
    return Failure(
        kind=job.stage,
        key=job.ref.key if job.ref else "",
        label=job.label,
        error=type(error).__name__,
        message=str(error),
        retryable=False,
        file=about.file,
        line=about.line,
        host="",
        created=now(),
    )


class _Progress:
    """Percentage of a stage as a Prefect artifact, for stages that last."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self._artifact: UUID | None = None
        self._lock = threading.Lock()
        self._told = time.monotonic()

    def add(self) -> None:
        """Counts one more; futures end in threads of their own."""
        with self._lock:
            self.done += 1

    def tell(self) -> None:
        """Writes the percentage if it was not written lately."""
        if time.monotonic() - self._told < PROGRESS_SECONDS:
            return
        self._told = time.monotonic()
        percent = 100.0 * self.done / self.total
        if self._artifact is None:
            made = create_progress_artifact(percent, f"progress-{self.stage}", f"Progress of {self.stage}")
            self._artifact = cast(UUID, made)
        else:
            update_progress_artifact(self._artifact, percent)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._artifact is not None:
            update_progress_artifact(self._artifact, 100.0 * self.done / self.total)
