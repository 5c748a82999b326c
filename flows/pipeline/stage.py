"""One stage of the chain: named task runs, a few in flight at once, every failure noted and none in the way of others.

    failed = run_stage("blocks", "blocks", jobs, store, recipe.run, window=4)

What to do was asked of the store before; what came out is asked of the store after. Prefect shows, it does not decide:
whether a job was done is known here, whatever becomes of its task run. Tiny jobs share a task run.
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

LOOK_SECONDS = 5.0
"""The progress artifact is brought up to date this often, even while no job ends."""

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@dataclass(frozen=True)
class Job:
    """One artifact to make by `work(force=force)`. `ref` is None while the content of a source is not known yet."""

    stage: str
    label: str
    ref: Ref | None
    work: Callable[..., object]
    force: bool = False


def raise_if_stopped() -> None:
    """Raises StoppedError in a job whose run was told to stop; long work in this process calls it now and then."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise StoppedError("the run was told to stop")


def run_stage(stage: str, verb: str, jobs: Sequence[Job], store: Store, run: RunSettings, window: int) -> list[Failure]:
    """Runs all jobs, `window` task runs in flight at once, and returns the failures in the order of the jobs.

    Never raises for a job's own error. When the run is told to stop, no other job is begun.
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
            # A call, not the loop itself: Python 3.11 skips `finally` for a signal that strikes as a loop at the very
            # beginning of `try` turns round.
            submitted, failures = _run_groups(bound_task(make_group, verb, run), groups, window, progress)
        finally:
            # After the last job it changes nothing; when the run is told to stop, no thread begins another one.
            stop.set()
    get_run_logger().info(
        f"{stage}: {len(jobs)} jobs in {submitted} task runs, {monotonic() - start:.2f} seconds, "
        f"in jobs {group_size.seconds:.2f}, at once {min(window, len(jobs))}"
    )
    return [failure for _, failure in sorted(failures, key=lambda one: one[0])]


def _run_groups(
    task: Task[..., Any], groups: "Iterator[_Group]", window: int, progress: ProgressArtifact
) -> tuple[int, list[tuple[int, Failure]]]:
    """Submits all groups, `window` in flight at once; how many there were, and place and failure of each bad job."""
    ended: SimpleQueue[_Group] = SimpleQueue()
    failures: list[tuple[int, Failure]] = []
    flying = submitted = 0
    while True:
        while flying < window and (group := next(groups, None)):
            task.submit(group.label, group).add_done_callback(partial(_put, ended, group))
            flying += 1
            submitted += 1
        if not flying:
            return submitted, failures
        progress.tell()
        try:
            group = ended.get(timeout=LOOK_SECONDS)
        except Empty:
            continue
        flying -= 1
        failures += group.failures()


def make_group(label: str, group: Callable[[], State[None] | None]) -> State[None] | None:
    """The body of every shard's task run; `label` names it."""
    return group()


class _GroupSize:
    """How many jobs share a task run, from the mean seconds that a job of this stage took so far in this run."""

    def __init__(self, seconds: float, window: int, total: int, tell: Callable[[], None]) -> None:
        self.wanted, self.window, self.total, self.tell = seconds, window, total, tell
        self.jobs, self.seconds = 0, 0.0
        self._lock = threading.Lock()

    def ended(self, seconds: float) -> None:
        """Takes one more job in, done or failed for good; jobs end in threads of their own."""
        with self._lock:
            self.jobs += 1
            self.seconds += seconds
            self.tell()

    def size(self, remaining: int) -> int:
        """Jobs of the next task run: about `run.task_seconds` of work, and never so many that a slot stays empty."""
        with self._lock:
            if not self.jobs:
                return 1
            mean = max(self.seconds / self.jobs, 1e-6)
        return max(1, min(int(self.wanted / mean), remaining // (2 * self.window)))


class _Group:
    """The jobs of one task run; calling it makes those of them that are not done yet, and may be repeated.

    A plain object: Prefect looks for futures inside dataclasses and models, at a cost.
    """

    def __init__(
        self, first: int, jobs: Sequence[Job], group_size: _GroupSize, store: Store, stop: threading.Event
    ) -> None:
        self.first, self.jobs, self.group_size, self.store, self.stop = first, jobs, group_size, store, stop
        self.errors: dict[int, Exception] = {}
        self._open = list(range(len(jobs)))
        self._spent = [0.0] * len(jobs)

    @property
    def label(self) -> str:
        """The first shard, and how many others come with it."""
        others = len(self.jobs) - 1
        return f"{self.jobs[0].label} +{others}" if others else self.jobs[0].label

    def __call__(self) -> State[None] | None:
        _stop.set(self.stop)
        for number in list(self._open):
            if not self.stop.is_set() and not isinstance(self._make(number), RetryableError):
                self._open.remove(number)
                self.group_size.ended(self._spent[number])
        if self.stop.is_set():
            return Cancelled(message="the run was told to stop")
        # A passing error goes first: Prefect tries the task run again for it, and then only what is open.
        for number in (*self._open, *self.errors):
            raise self.errors[number]
        return None

    def _make(self, number: int) -> Exception | None:
        """Makes one artifact; its error is kept, so that one bad shard does not stop the others of its group."""
        job, start = self.jobs[number], monotonic()
        self.errors.pop(number, None)
        try:
            job.work(force=job.force)
        except Exception as error:  # noqa: BLE001  __call__ raises it when the others of the group are done
            self.errors[number] = error
            if job.ref is not None and not self.stop.is_set():
                with suppress(RetryableError):  # the store itself may be what does not answer
                    self.store.fail(job.ref, error)
        self._spent[number] += monotonic() - start
        return self.errors.get(number)

    def failures(self) -> Iterator[tuple[int, Failure]]:
        """Position and failure of each job that is not done, once the task run has ended in whatever way."""
        lost = DistilError("Prefect ended its task run before it was tried; retry it")
        errors = dict.fromkeys(self._open, lost) | self.errors
        for number, error in errors.items():
            yield self.first + number, _failure(self.jobs[number], error)


def _put(ended: "SimpleQueue[_Group]", group: _Group, _future: object) -> None:
    ended.put(group)


def _groups(jobs: Sequence[Job], group_size: _GroupSize, store: Store, stop: threading.Event) -> Iterator[_Group]:
    """All jobs in their order; the size of a group is decided when a slot is free for it."""
    first = 0
    while first < len(jobs):
        size = group_size.size(len(jobs) - first)
        yield _Group(first, jobs[first : first + size], group_size, store, stop)
        first += size


def _failure(job: Job, error: Exception) -> Failure:
    get_run_logger().error(f"{job.stage} {job.label}: {error}")
    return Failure.from_error(job.stage, job.ref.key if job.ref else "", job.label, error)
