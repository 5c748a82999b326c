"""Marks runs Crashed or Cancelled if they lost their process when this machine's worker was killed.

    marked = mark_stale_runs(client)     # before the new worker starts

A run is stale if it is active in Prefect, this machine's worker took it, and no process of this machine works on it.
Runs of other machines are not changed, since their processes are not visible here. This module corrects only Prefect's
database; tasks/parent_death.py lists the mechanisms that end processes.
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
"""A worker adds its name to a run when it takes the run. A run that is Pending without a name for longer is stale."""

PAGE = 200


@dataclass(frozen=True)
class Marked:
    """A stale run and its new state, `Crashed` or `Cancelled`."""

    name: str
    state: str


def worker_name() -> str:
    """Returns the name of this user's worker on this machine. Prefect stores it with each run that the worker takes.

    The name contains the user id: the processes of another user cannot be checked, since their environment is not
    readable.
    """
    return f"{socket.gethostname()}-{os.getuid()}"


def mark_stale_runs(client: SyncPrefectClient) -> list[Marked]:
    """Marks all runs of deployments that lost their process on this machine, and returns them."""
    alive = _runs_with_process()
    return [_mark(client, run) for run in list(_active(client)) if str(run.id) not in alive and _is_ours(run)]


def _active(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """Yields all runs of deployments whose state is in ALIVE."""
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ALIVE))),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),
    )
    offset = 0
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=offset):
        yield from page
        offset += PAGE


def _runs_with_process() -> set[str]:
    """Returns the ids of the runs that a process of this machine works on."""
    ids = set()
    for process in psutil.process_iter():
        try:
            ids.add(process.environ().get(RUN_ID, ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return ids


def _is_ours(run: FlowRun) -> bool:
    """Returns True if this machine's worker took the run, or no worker did within UNCLAIMED_AFTER."""
    name = run.labels.get("prefect.worker.name")
    if name is not None:
        return name == worker_name()
    state = run.state
    if state is None or state.type == StateType.RUNNING:
        return False  # started by a program, without a worker
    return datetime.now(UTC) - state.timestamp > UNCLAIMED_AFTER


def _mark(client: SyncPrefectClient, run: FlowRun) -> Marked:
    """Marks a run Cancelled if it was being cancelled, else Crashed, and returns it with its new state."""
    state: State[Any]
    if run.state_type == StateType.CANCELLING:
        state = Cancelled(message="The process ended before it could report the cancellation.")
    else:
        state = Crashed(message="The process ended without reporting a state; press Retry to resume from the store.")
    # Forced, since orchestration rules apply to transitions that the flow process itself reports.
    client.set_flow_run_state(run.id, state, force=True)
    return Marked(run.name, str(state.name))
