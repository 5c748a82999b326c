"""Runs that this machine's worker left behind when it was killed: found at the next start, and marked as what they are.

    marked = reconcile(client)           # before the new worker starts

A run counts as dead when Prefect takes it for alive, this machine's worker had it, and no process here works on it. The
runs of other machines are left alone: their processes cannot be seen from here.
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
"""In the environment of every flow process."""

ALIVE = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)

NAMELESS = timedelta(minutes=1)
"""A worker signs a run in the moment in which it takes it; one that is Pending for longer without a name was lost."""

PAGE = 200


@dataclass(frozen=True)
class Marked:
    """A run that was left behind, and what it is now: `Crashed` or `Cancelled`."""

    name: str
    state: str


def worker_name() -> str:
    """The name of this user's worker on this machine; Prefect notes it with each run that the worker takes.

    Another user's processes cannot be looked into, so his runs are not ours to judge.
    """
    return f"{socket.gethostname()}-{os.getuid()}"


def mark_stale_runs(client: SyncPrefectClient) -> list[Marked]:
    """Marks every deployment's run that lost its process on this machine; returns them."""
    living = _living()
    return [_mark(client, run) for run in list(_taken(client)) if str(run.id) not in living and _ours(run)]


def _taken(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """All runs of deployments that Prefect takes for alive."""
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ALIVE))),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),
    )
    offset = 0
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=offset):
        yield from page
        offset += PAGE


def _living() -> set[str]:
    """Ids of the runs that a process of this machine works on."""
    ids = set()
    for process in psutil.process_iter():
        try:
            ids.add(process.environ().get(RUN_ID, ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return ids


def _ours(run: FlowRun) -> bool:
    """Whether this machine's worker had the run, or nobody came so far as to sign it."""
    name = run.labels.get("prefect.worker.name")
    if name is not None:
        return name == worker_name()
    state = run.state
    if state is None or state.type == StateType.RUNNING:
        return False  # started without a worker, from somebody's own program
    return datetime.now(UTC) - state.timestamp > NAMELESS


def _mark(client: SyncPrefectClient, run: FlowRun) -> Marked:
    state: State[Any]
    if run.state_type == StateType.CANCELLING:
        state = Cancelled(message="The process had ended before it could report the cancellation.")
    else:
        state = Crashed(message="The process ended without a report; Retry goes on with what is in the store.")
    # Forced: the rules of orchestration are made for the process itself.
    client.set_flow_run_state(run.id, state, force=True)
    return Marked(run.name, str(state.name))
