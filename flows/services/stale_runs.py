"""Marks runs Crashed or Cancelled that lost their process when this machine's worker was killed.

    marked = mark_stale_runs(client)     # before the new worker starts

A run is stale if Prefect has it as running, this machine's worker took it, and no process here works on it. Runs of
other machines are left alone, since their processes are not visible here. This corrects Prefect's database only;
tasks/parent_death.py lists the mechanisms that end the processes.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

RUN_ID = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect sets for every flow process of a worker."""

ALIVE = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)

UNCLAIMED_AFTER = timedelta(minutes=1)
"""A worker puts its name on a run when it takes it; a run that is Pending for longer without a name is lost."""

PAGE = 200


@dataclass(frozen=True)
class Marked:
    """A stale run and its new state, `Crashed` or `Cancelled`."""

    name: str
    state: str


def worker_name() -> str:
    """The name of this user's worker on this machine; Prefect stores it with each run that the worker takes.

    It contains the user id, since the environments of another user's processes are not readable.
    """
    return f"{socket.gethostname()}-{os.getuid()}"


def mark_stale_runs(client: SyncPrefectClient) -> list[Marked]:
    """Marks all runs of deployments that lost their process on this machine, and returns them."""
    alive = _runs_with_process()
    return [_mark(client, run) for run in list(_active(client)) if str(run.id) not in alive and _is_ours(run)]


def _active(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """All runs of deployments in a state of ALIVE."""
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ALIVE))),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),
    )
    offset = 0
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=offset):
        yield from page
        offset += PAGE


def _runs_with_process() -> set[str]:
    """Ids of the runs that a process of this machine works on."""
    ids = set()
    for process in psutil.process_iter():
        try:
            ids.add(process.environ().get(RUN_ID, ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return ids


def _is_ours(run: FlowRun) -> bool:
    """True if this machine's worker took the run, or it is Pending without a worker for longer than UNCLAIMED_AFTER."""
    name = run.labels.get("prefect.worker.name")
    if name is not None:
        return name == worker_name()
    state = run.state
    if state is None or state.type == StateType.RUNNING:
        return False  # started without a worker, from a program
    return datetime.now(UTC) - state.timestamp > UNCLAIMED_AFTER


def _mark(client: SyncPrefectClient, run: FlowRun) -> Marked:
    """Sets Cancelled for a run that was being cancelled, else Crashed."""
    state: State[Any]
    if run.state_type == StateType.CANCELLING:
        state = Cancelled(message="The process had ended before it could report the cancellation.")
    else:
        state = Crashed(message="The process ended without a report; Retry resumes from what is in the store.")
    # Forced: the orchestration rules apply to transitions that the flow process reports itself.
    client.set_flow_run_state(run.id, state, force=True)
    return Marked(run.name, str(state.name))
