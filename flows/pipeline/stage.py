"""Runs the jobs of one stage as Prefect task runs, a bounded number in flight; a failed job stops no other.

    failures = run_stage("blocks", "blocks", jobs, store, recipe.run, window=4)

The caller asks the store which jobs to run. Prefect shows the task runs and retries them; whether a job succeeded is
recorded here, whatever state its task run ends in. Short jobs share a task run.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from prefect import State, Task, get_run_logger
from prefect.states import Cancelled

from flows.pipeline.process_pool import StoppedError
from flows.pipeline.task_policy import bound_task
from flows.views.prefect_artifacts import ProgressArtifact
from flows.views.tables import bar
from storage.artifact import Failure, Ref
from storage.errors import DistilError, RetryableError
from storage.store import Store
from tasks.recipe.config import RunSettings

POLL_SECONDS = 5.0
"""Longest wait for the end of a task run before the progress artifact is updated."""

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@dataclass(frozen=True)
class Job:
    """One artifact, made by `work(force=force)`. `ref` is None while the content of a source is not known yet."""

    stage: str
    label: str
    ref: Ref | None
    work: Callable[..., object]
    force: bool = False


def raise_if_stopped() -> None:
    """Raises StoppedError in a job whose run was stopped. Long work in this process must call it regularly."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise StoppedError("the run was stopped")


def run_stage(stage: str, verb: str, jobs: Sequence[Job], store: Store, run: RunSettings, window: int) -> list[Failure]:
    """Runs all jobs, `window` task runs in flight at once, and returns the failures in the order of the jobs.

    A job's own error is returned, never raised. After an interrupt no further job is started.
    """
    if not jobs:
        return []
    stop = threading.Event()
    with bar(stage, len(jobs)) as advance, ProgressArtifact(stage, len(jobs)) as progress:

        def done() -> None:
            advance(1)
            progress.add()

        group_size = _GroupSize(run.task_seconds, window, len(jobs), done)
        groups = _groups(jobs, group_size, store, stop)
        start = monotonic()
        try:
            # A call, not the loop itself: Python 3.11 skips `finally` if a signal arrives as a loop that is the first
            # statement of `try` jumps back.
            submitted, failures = _run_groups(bound_task(make_group, verb, run), groups, window, progress)
        finally:
            # After an interrupt no thread may start another job.
            stop.set()
    get_run_logger().info(
        f"{stage}: {len(jobs)} jobs in {submitted} task runs, {monotonic() - start:.2f} seconds, "
        f"{group_size.seconds:.2f} seconds in jobs, {min(window, len(jobs))} task runs at once"
    )
    return [failure for _, failure in sorted(failures, key=lambda one: one[0])]


def _run_groups(
    task: Task[..., Any], groups: "Iterator[_Group]", window: int, progress: ProgressArtifact
) -> tuple[int, list[tuple[int, Failure]]]:
    """Submits all groups, `window` in flight; returns their number, and position and failure of each failed job."""
    ended: SimpleQueue[_Group] = SimpleQueue()
    failures: list[tuple[int, Failure]] = []
    in_flight = submitted = 0
    while True:
        while in_flight < window and (group := next(groups, None)):
            task.submit(group.label, group).add_done_callback(partial(_put, ended, group))
            in_flight += 1
            submitted += 1
        if not in_flight:
            return submitted, failures
        progress.publish()
        try:
            group = ended.get(timeout=POLL_SECONDS)
        except Empty:
            continue
        in_flight -= 1
        failures += group.failures()


def make_group(label: str, group: Callable[[], State[None] | None]) -> State[None] | None:
    """The body of every task run; `label` is only its name."""
    return group()


class _GroupSize:
    """Chooses how many jobs share a task run, from the mean duration of the jobs of this stage so far."""

    def __init__(self, seconds: float, window: int, total: int, on_job_done: Callable[[], None]) -> None:
        self.wanted, self.window, self.total, self.on_job_done = seconds, window, total, on_job_done
        self.jobs, self.seconds = 0, 0.0
        self._lock = threading.Lock()

    def ended(self, seconds: float) -> None:
        """Counts one more job, done or failed for good. Called from the threads of the task runs."""
        with self._lock:
            self.jobs += 1
            self.seconds += seconds
            self.on_job_done()

    def size(self, remaining: int) -> int:
        """Number of jobs of the next task run: about `run.task_seconds` of work, few enough to keep all slots busy."""
        with self._lock:
            if not self.jobs:
                return 1
            mean = max(self.seconds / self.jobs, 1e-6)
        return max(1, min(int(self.wanted / mean), remaining // (2 * self.window)))


class _Group:
    """The jobs of one task run. A call runs those that are not done yet, so Prefect may retry it.

    Not a dataclass: Prefect searches dataclasses and pydantic models for futures, which takes time.
    """

    def __init__(
        self, first: int, jobs: Sequence[Job], group_size: _GroupSize, store: Store, stop: threading.Event
    ) -> None:
        self.first, self.jobs, self.group_size, self.store, self.stop = first, jobs, group_size, store, stop
        self.errors: dict[int, Exception] = {}
        self._unfinished = list(range(len(jobs)))
        self._seconds = [0.0] * len(jobs)

    @property
    def label(self) -> str:
        """The label of the first job, and the number of the others."""
        others = len(self.jobs) - 1
        return f"{self.jobs[0].label} +{others}" if others else self.jobs[0].label

    def __call__(self) -> State[None] | None:
        _stop.set(self.stop)
        for number in list(self._unfinished):
            if not self.stop.is_set() and not isinstance(self._make(number), RetryableError):
                self._unfinished.remove(number)
                self.group_size.ended(self._seconds[number])
        if self.stop.is_set():
            return Cancelled(message="the run was stopped")
        # Retryable errors come first: for these Prefect retries the task run, which then runs only unfinished jobs.
        for number in (*self._unfinished, *self.errors):
            raise self.errors[number]
        return None

    def _make(self, number: int) -> Exception | None:
        """Makes one artifact. Its error is returned and kept, so that the other jobs of the group still run."""
        job, start = self.jobs[number], monotonic()
        self.errors.pop(number, None)
        try:
            job.work(force=job.force)
        except Exception as error:  # noqa: BLE001  __call__ raises it after the other jobs of the group
            self.errors[number] = error
            if job.ref is not None and not self.stop.is_set():
                with suppress(RetryableError):  # the store itself may not answer
                    self.store.fail(job.ref, error)
        self._seconds[number] += monotonic() - start
        return self.errors.get(number)

    def failures(self) -> Iterator[tuple[int, Failure]]:
        """Position and failure of each job that is not done, after the end of the task run."""
        lost = DistilError("Prefect ended its task run before it was tried; retry it")
        errors = dict.fromkeys(self._unfinished, lost) | self.errors
        for number, error in errors.items():
            yield self.first + number, _failure(self.jobs[number], error)


def _put(ended: "SimpleQueue[_Group]", group: _Group, _future: object) -> None:
    ended.put(group)


def _groups(jobs: Sequence[Job], group_size: _GroupSize, store: Store, stop: threading.Event) -> Iterator[_Group]:
    """All jobs in order. The size of each group is chosen when a slot becomes free for it."""
    first = 0
    while first < len(jobs):
        size = group_size.size(len(jobs) - first)
        yield _Group(first, jobs[first : first + size], group_size, store, stop)
        first += size


def _failure(job: Job, error: Exception) -> Failure:
    get_run_logger().error(f"{job.stage} {job.label}: {error}")
    return Failure.from_error(job.stage, job.ref.key if job.ref else "", job.label, error)
