"""Runs that lost their process: those of this machine are marked, those of others and live ones are not."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Completed, Pending, Running, Scheduled

from flows.services.stale_runs import RUN_ID, mark_stale_runs, worker_name

pytestmark = pytest.mark.usefixtures("prefect_api")
HERE = {"prefect.worker.name": worker_name()}
THERE = {"prefect.worker.name": "another-machine"}
OTHER_USER = {"prefect.worker.name": f"{socket.gethostname()}-{os.getuid() + 1}"}


@flow(name="left-behind")
def nothing() -> None:
    """The flow of this test's deployments."""


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def made(client: SyncPrefectClient, state: State[None], labels: dict[str, str] | None = None) -> UUID:
    """A run of a deployment in some state, as a worker with these labels left it."""
    deployment = client.create_deployment(client.create_flow(nothing), name=f"test-{uuid4()}")
    run = client.create_flow_run_from_deployment(deployment, state=Scheduled())
    if labels:
        client._client.patch(f"/flow_runs/{run.id}/labels", json=labels).raise_for_status()
    client.set_flow_run_state(run.id, state, force=True)
    return run.id


def state_of(client: SyncPrefectClient, run: UUID) -> str:
    found: FlowRun = client.read_flow_run(run)
    return found.state_name or ""


def test_runs_of_this_machine_without_a_process_are_marked(client: SyncPrefectClient) -> None:
    running, pending, cancelling = (made(client, state, HERE) for state in (Running(), Pending(), Running()))
    client.set_flow_run_state(cancelling, Cancelling(), force=True)
    marked = mark_stale_runs(client)
    assert sorted(run.state for run in marked) == ["Cancelled", "Crashed", "Crashed"]
    assert [state_of(client, run) for run in (running, pending, cancelling)] == ["Crashed", "Crashed", "Cancelled"]
    assert "press Retry to resume" in (client.read_flow_run(running).state.message or "")
    assert mark_stale_runs(client) == []


def test_runs_of_other_machines_and_users_and_scheduled_or_ended_ones_are_left_alone(
    client: SyncPrefectClient,
) -> None:
    states = [(Running(), THERE), (Running(), OTHER_USER), (Scheduled(), HERE), (Completed(), HERE)]
    runs = [made(client, state, labels) for state, labels in states]
    assert mark_stale_runs(client) == []
    assert [state_of(client, run) for run in runs] == ["Running", "Running", "Scheduled", "Completed"]


def test_a_run_with_a_process_is_left_alone(client: SyncPrefectClient) -> None:
    run = made(client, Running(), HERE)
    command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        command, env=os.environ | {RUN_ID: str(run)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        assert mark_stale_runs(client) == []
        assert state_of(client, run) == "Running"
        process.stdin.close()
        process.wait(60)
    assert [one.state for one in mark_stale_runs(client)] == ["Crashed"]


def test_a_pending_run_without_a_worker_is_marked_after_a_minute(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending, started_by_hand = made(client, Pending()), made(client, Running())
    assert mark_stale_runs(client) == []
    monkeypatch.setattr("flows.services.stale_runs.UNCLAIMED_AFTER", timedelta(0))
    assert len(mark_stale_runs(client)) == 1
    assert [state_of(client, run) for run in (pending, started_by_hand)] == ["Crashed", "Running"]
