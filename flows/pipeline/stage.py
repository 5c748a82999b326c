"""Runs the jobs of one stage as Prefect task runs, with a limited number in flight. A failed job does not stop others.

    failures = run_stage("blocks", "blocks", jobs, store, recipe.run, window=4)

The caller selects the jobs. Prefect shows and retries the task runs; the success of each job is recorded here,
independently of the final state of its task run. Short jobs share a task run.
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
"""Longest time to wait for the end of a task run before the progress artifact is updated."""

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@dataclass(frozen=True)
class Job:
    """Makes one artifact by calling `work(force=force)`; `force` makes it again even if it exists.

    `ref` is None for a source whose content is not hashed yet.
    """

    stage: str
    label: str
    ref: Ref | None
    work: Callable[..., object]
    force: bool = False


def raise_if_stopped() -> None:
    """Raises StoppedError if the run of the current job was stopped. Long jobs in this process call it regularly."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise StoppedError("the run was stopped")


def run_stage(stage: str, verb: str, jobs: Sequence[Job], store: Store, run: RunSettings, window: int) -> list[Failure]:
    """Runs all jobs with at most `window` task runs in flight, and returns the failures in the order of the jobs.

    The error of a job is returned, never raised. After an interrupt no further job is started.
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
            # The loop is in a function: if it were the first statement of `try`, Python 3.11 would skip `finally` when
            # a signal arrives as the loop jumps back.
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
    """Submits all groups with at most `window` in flight.

    Returns the number of groups, and the position and failure of each failed job.
    """
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
    """Body of every task run of a stage. `label` is used only in the name of the task run."""
    return group()


class _GroupSize:
    """Chooses how many jobs share a task run, from the mean duration of the finished jobs of the stage."""

    def __init__(self, seconds: float, window: int, total: int, on_job_done: Callable[[], None]) -> None:
        self.wanted, self.window, self.total, self.on_job_done = seconds, window, total, on_job_done
        self.jobs, self.seconds = 0, 0.0
        self._lock = threading.Lock()

    def ended(self, seconds: float) -> None:
        """Counts one more job that is done or has failed with a fatal error. Called from threads of task runs."""
        with self._lock:
            self.jobs += 1
            self.seconds += seconds
            self.on_job_done()

    def size(self, remaining: int) -> int:
        """Returns the number of jobs for the next task run, given the number of remaining jobs.

        The jobs take about `run.task_seconds`, and enough of them remain to keep all slots busy.
        """
        with self._lock:
            if not self.jobs:
                return 1
            mean = max(self.seconds / self.jobs, 1e-6)
        return max(1, min(int(self.wanted / mean), remaining // (2 * self.window)))


class _Group:
    """The jobs of one task run. A call runs only unfinished jobs, so Prefect can retry it.

    This is not a dataclass because Prefect searches dataclasses and pydantic models for futures, which takes time.
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
        """The label of the first job and, if there are more, the number of the others."""
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
        # Retryable errors are raised first: Prefect then retries the task run, which runs only the unfinished jobs.
        for number in (*self._unfinished, *self.errors):
            raise self.errors[number]
        return None

    def _make(self, number: int) -> Exception | None:
        """Runs one job. Stores and returns its error instead of raising it, so that the other jobs of the group run."""
        job, start = self.jobs[number], monotonic()
        self.errors.pop(number, None)
        try:
            job.work(force=job.force)
        except Exception as error:  # noqa: BLE001  __call__ raises it after the other jobs of the group
            self.errors[number] = error
            if job.ref is not None and not self.stop.is_set():
                with suppress(RetryableError):  # the store itself may not respond
                    self.store.fail(job.ref, error)
        self._seconds[number] += monotonic() - start
        return self.errors.get(number)

    def failures(self) -> Iterator[tuple[int, Failure]]:
        """Yields position and failure of each job that is not done after the end of the task run."""
        lost = DistilError("Prefect ended the task run before this job started; retry it with `distil retry`")
        errors = dict.fromkeys(self._unfinished, lost) | self.errors
        for number, error in errors.items():
            yield self.first + number, _failure(self.jobs[number], error)


def _put(ended: "SimpleQueue[_Group]", group: _Group, _future: object) -> None:
    ended.put(group)


def _groups(jobs: Sequence[Job], group_size: _GroupSize, store: Store, stop: threading.Event) -> Iterator[_Group]:
    """Yields all jobs in order, in groups. The size of a group is chosen when a slot becomes free for it."""
    first = 0
    while first < len(jobs):
        size = group_size.size(len(jobs) - first)
        yield _Group(first, jobs[first : first + size], group_size, store, stop)
        first += size


def _failure(job: Job, error: Exception) -> Failure:
    get_run_logger().error(f"{job.stage} {job.label}: {error}")
    return Failure.from_error(job.stage, job.ref.key if job.ref else "", job.label, error)
