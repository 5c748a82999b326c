"""Approval before promotion: the run pauses with a form, an invalid answer changes nothing, a valid one decides."""

import contextvars
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
import pytest

from storage.fingerprint import sha256_bytes
from tasks.recipe.config import Recipe
from tasks.recipe.load import load_recipe
from tasks.release.results import SetResult
from tests.harness.processes import wait_for
from tests.harness.recipe_values import simple_recipe

if TYPE_CHECKING:
    from flows.tracking.mlflow_runs import MlflowRuns

pytestmark = pytest.mark.slow
WAIT = 180.0


@pytest.fixture
def recipe(tmp_path: Path, prefect_api: None, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    from flows.release import approval

    monkeypatch.setattr(approval, "POLL_SECONDS", 1)
    values = {
        "home": str(tmp_path),
        "register": {"name": f"tiny-{os.urandom(4).hex()}", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "gate": {"approval": True},
    }
    return simple_recipe(**values)


def paused_run(asked: "Future[object]", seen: set[UUID]) -> UUID:
    """Waits until a run that was not seen before is paused, and returns its id."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
    end = time.monotonic() + WAIT
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            if asked.done():
                raise AssertionError(f"the run ended without asking: {asked.result()}")
            for run in client.read_flow_runs(flow_run_filter=paused):
                if run.id not in seen:
                    seen.add(run.id)
                    return run.id
            time.sleep(0.2)
    raise AssertionError("no run was paused")


def answer(run: UUID, values: Mapping[str, object]) -> str:
    """Sends the form; the state of the run right after it."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.resume_flow_run(run, run_input=dict(values))
        return str(client.read_flow_run(run).state.type.value)  # type: ignore[union-attr]


def scored_version(recipe: Recipe) -> "MlflowRuns":
    """The MLflow of a recipe, with one version that the gate lets through."""
    from flows.release.version_results import record_results
    from flows.tracking.mlflow_runs import open_mlflow_runs

    mlflow_runs, name = open_mlflow_runs(recipe), recipe.register_as.name
    run = mlflow_runs.start_or_resume_run("chain", sha256_bytes(b"approval"), "tiny")
    mlflow_runs.client.create_registered_model(name)
    mlflow_runs.client.create_model_version(name, f"runs:/{run}/model", run_id=run)
    record_results(
        mlflow_runs.registry,
        mlflow_runs.registry.version(name, "1"),
        [SetResult("heldout", "top1", (0.5,))],
        {"heldout": "a" * 64},
    )
    return mlflow_runs


def test_a_person_says_no_and_then_yes(recipe: Recipe) -> None:
    from flows.promote import promote

    mlflow_runs, name = scored_version(recipe), recipe.register_as.name
    seen: set[UUID] = set()
    with ThreadPoolExecutor(1) as pool:

        def ask() -> "Future[object]":
            return pool.submit(contextvars.copy_context().run, promote, recipe, name, "1", return_state=True)  # type: ignore[arg-type]

        asked = ask()
        first = paused_run(asked, seen)
        assert answer(first, {"approve": "perhaps", "by": "marie"}) == "PAUSED"
        assert answer(first, {"approve": True}) == "PAUSED"  # without a name
        assert mlflow_runs.registry.champion(name) is None
        assert answer(first, {"approve": False, "by": "marie", "reason": "wait for NER"}) == "RUNNING"
        refused = asked.result(WAIT)
        assert (refused.name, refused.is_failed()) == ("Refused", True)  # type: ignore[attr-defined]
        assert mlflow_runs.registry.champion(name) is None
        tags = mlflow_runs.registry.version(name, "1").tags
        assert tags["distil.gate.decision"] == "declined"
        assert tags["distil.gate.reason"] == "declined by marie: wait for NER"

        asked = ask()
        assert answer(paused_run(asked, seen), {"approve": True, "by": "marie"}) == "RUNNING"
        assert asked.result(WAIT).is_completed()  # type: ignore[attr-defined]
        assert mlflow_runs.registry.champion(name) == mlflow_runs.registry.version(name, "1")
        tags = mlflow_runs.registry.version(name, "1").tags
        assert (tags["distil.gate.decision"], tags["distil.gate.approved_by"]) == ("promoted", "marie")


ALONE = """
name = "tiny"
home = "home"
[corpus]
url = "x"
[teacher]
model = "y"
[gate]
approval = true
"""


def test_without_distil_up_the_link_leads_to_the_server_of_the_run(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.toml").write_text(ALONE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "home" / "mlflow").mkdir(parents=True)
    mlflow_runs = scored_version(load_recipe(tmp_path / "tiny.toml"))
    command = [sys.executable, "-m", "flows.cli", "promote", "tiny.toml", "--version", "1"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=said)
    try:
        server, page, run = link_in(tmp_path / "said", process)
        wait_for(lambda: httpx.get(f"{server}/api/flow_runs/{run}", timeout=60).json()["state"]["type"] == "PAUSED")
        browser = {"Accept": "text/html"}
        assert "<html" in httpx.get(f"{server}{page}{run}", headers=browser, follow_redirects=True, timeout=60).text
        form = {"run_input": {"approve": True, "by": "marie"}}
        httpx.post(f"{server}/api/flow_runs/{run}/resume", json=form, timeout=60).raise_for_status()
        assert process.wait(WAIT) == 0, (tmp_path / "said").read_text()
    finally:
        process.kill()
        process.wait()
    assert mlflow_runs.registry.version("distilled", "1").tags["distil.gate.approved_by"] == "marie"


def link_in(said: Path, process: "subprocess.Popen[bytes]") -> tuple[str, str, str]:
    """Waits until a process prints the link to its form: server, page and run."""
    link = re.compile(r"decline in (http://127\.0\.0\.1:\d+)(/\S+/)(\S+)\n")
    wait_for(lambda: link.search(said.read_text()) or process.poll() is not None)
    found = link.search(said.read_text())
    assert found, said.read_text()
    server, page, run = found.groups()
    return server, page, run


def test_no_answer_in_time_is_a_no_and_a_retried_run_asks_again(recipe: Recipe) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import FlowRun
    from prefect.flow_engine import run_flow
    from prefect.states import Crashed, Pending

    from flows.release.approval import ask_for_approval

    @flow
    def asking(hours: float) -> str:
        answer = ask_for_approval("May it?", ["It may."], hours)
        return f"{answer.approve} by {answer.by}"

    state = asking(2 / 3600, return_state=True)
    assert (state.is_completed(), state.result()) == (True, "False by the time limit")

    def again(run: FlowRun) -> str:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(contextvars.copy_context().run, run_flow, asking, run, {"hours": 1.0})  # type: ignore[arg-type]
            assert answer(paused_run(asked, set()), {"approve": True, "by": "marie"}) == "RUNNING"  # type: ignore[arg-type]
            return str(asked.result(WAIT))

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(asking, parameters={"hours": 1.0})
        assert again(run) == "True by marie"
        client.set_flow_run_state(run.id, Crashed(), force=True)
        client.set_flow_run_state(run.id, Pending(), force=True)
        assert again(client.read_flow_run(run.id)) == "True by marie"
