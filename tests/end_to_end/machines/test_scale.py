"""Two thousand small shards through one deployed `prepare` run, on SQLite and on PostgreSQL, and once more.

The store must be complete, and no flow run may hang. The figures are printed (pytest -s): time, task runs that the
server lost, and the cost of orchestration per shard.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType

from storage.verify import verify
from tests.hard.reliability import record
from tests.harness.processes import wait_for
from tests.harness.project import make_project
from tests.harness.servers.postgres import Postgres
from tests.harness.servers.prefect_server import PrefectServer, serving
from tests.harness.tiny import write_oscar

pytestmark = pytest.mark.slow

SHARDS = 2000
SOURCES = 20
SETTINGS = ("corpus.heldout_per_mille=0", "blocks.length=128")
AGAIN_SECONDS = 15.0
STAGE = re.compile(
    r"(?P<stage>\w+): (?P<jobs>\d+) jobs in (?P<runs>\d+) task runs, (?P<seconds>[\d.]+) seconds, "
    r"(?P<inside>[\d.]+) seconds in jobs, (?P<slots>\d+) task runs at once"
)


def stages_of(own_server: PrefectServer, run: UUID) -> list[dict[str, str]]:
    """Jobs, task runs and seconds of each stage, from the run's log."""
    with own_server.client as client:
        found = client.request("POST", "/logs/filter", json={"logs": {"flow_run_id": {"any_": [str(run)]}}}).json()
    return [match.groupdict() for line in found if (match := STAGE.fullmatch(line["message"]))]


def task_states(own_server: PrefectServer, run: UUID) -> dict[str, int]:
    """How many task runs of a flow run the server knows in each state."""
    states: dict[str, int] = {}
    this = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    with own_server.client as client:
        while page := client.read_task_runs(flow_run_filter=this, limit=200, offset=sum(states.values())):
            for one in page:
                name = one.state.type.value if one.state else "NONE"
                states[name] = states.get(name, 0) + 1
    return states


def seconds(run: FlowRun) -> float:
    """From Running to its end."""
    assert run.start_time
    assert run.end_time
    return (run.end_time - run.start_time).total_seconds()


def report(database: str, own_server: PrefectServer, run: FlowRun) -> None:
    """Prints what the run cost, and how many task runs the server has lost."""
    wait_for(lambda: any(stage["stage"] == "targets" for stage in stages_of(own_server, run.id)))  # logs come in late
    stages = stages_of(own_server, run.id)
    submitted = sum(int(stage["runs"]) for stage in stages)
    wait_for(lambda: not task_states(own_server, run.id).keys() & {"RUNNING", "PENDING"})
    recorded = sum(task_states(own_server, run.id).values())
    jobs = sum(int(stage["jobs"]) for stage in stages)
    wall = seconds(run)
    overhead = wall - sum(float(stage["inside"]) / int(stage["slots"]) for stage in stages)
    print(f"\n{database}: {jobs} jobs in {wall:.1f} s; {submitted} task runs submitted, {submitted - recorded} lost")
    record(
        "tests/end_to_end/machines/test_scale.py",
        f"{database}: {jobs:,} jobs in {wall:.0f} s, {submitted - recorded} task runs lost",
    )
    print(f"orchestration: {1000 * overhead / jobs:.2f} ms per job, {100 * overhead / wall:.1f} % of the time")
    for stage in stages:
        print("  {stage}: {jobs} jobs, {runs} task runs, {seconds} s".format(**stage))


@contextmanager
def sqlite_server(folder: Path, _request: pytest.FixtureRequest) -> Iterator[PrefectServer]:
    with serving(folder) as own_server:
        own_server.create_pool()
        yield own_server


@contextmanager
def postgres_server(folder: Path, request: pytest.FixtureRequest) -> Iterator[PrefectServer]:
    database: Postgres = request.getfixturevalue("postgres")
    with serving(folder, database=database.prefect) as own_server:
        own_server.create_pool()
        yield own_server


@pytest.mark.parametrize(("database", "on"), [("SQLite", sqlite_server), ("PostgreSQL", postgres_server)])
def test_two_thousand_shards(
    database: str,
    on: Callable[..., "contextmanager[PrefectServer]"],
    teacher: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    corpus = write_oscar(tmp_path / "corpus", parts=SOURCES, texts=2700)
    project = make_project(tmp_path / "project", corpus, teacher)
    with on(tmp_path / "own_server", request) as own_server:
        own_server.start_worker()
        first = own_server.wait(own_server.create_run("prepare", project, *SETTINGS), "COMPLETED")
        report(database, own_server, first)
        made = {kind: project.store.keys(kind) for kind in ("source", "shard", "blocks", "targets")}
        assert len(made["source"]) == SOURCES
        assert len(made["shard"]) >= SHARDS
        assert len(made["shard"]) == len(made["blocks"]) == len(made["targets"])
        assert verify(project.store) == []
        before = project.creation_times()

        again = own_server.wait(own_server.create_run("prepare", project, *SETTINGS), "COMPLETED")
        print(f"again, with nothing to do: {seconds(again):.1f} s")
        assert again.state
        assert again.state.message == "nothing to do"
        assert project.creation_times() == before
        assert seconds(again) < AGAIN_SECONDS

        with own_server.client as client:
            states = [run.state.type for run in client.read_flow_runs() if run.state]
        assert states == [StateType.COMPLETED] * 2
