"""Links to the pages of a run, and all flows as deployments of a real server with a worker in another folder."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.services import servers as server
from flows.services.process import Service
from tests.harness.processes import running

DEPLOY = """
import sys
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments import run_deployment
from prefect.deployments.runner import RunnerDeployment
from tasks.recipe.load import load_recipe

repo, recipe = sys.argv[1:3]
values = load_recipe(recipe, ["train.max_steps=5"]).model_dump(mode="json", by_alias=True)
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="local", type="process"))
for entry, flow, more in (
    ("distill.py:distill", "distill", {}),
    ("prepare.py:prepare", "prepare", {}),
    ("retry.py:retry_shard", "retry-shard", {"stage": "blocks", "shard": "fr_meta_part_2-0000", "force": True}),
    ("score.py:score", "score", {"model": values["teacher"]["model"]}),
):
    parameters = {"recipe": values} | more
    RunnerDeployment.from_entrypoint(f"{repo}/flows/{entry}", name="test", work_pool_name="local").apply()
    run = run_deployment(f"{flow}/test", parameters=parameters, timeout=300, poll_interval=1, as_subflow=False)
    print(flow, run.state.type.value, run.state.message)
with get_client(sync_client=True) as client:
    for run in client.read_task_runs():
        print("task", run.name, run.state.type.value)
"""


@pytest.fixture
def api(place: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A server, and a worker in an empty folder; yields the environment of their clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    known = environment | {
        "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_STATIC_DIRECTORY": str(place / "ui"),
    }
    worker = ["prefect", "worker", "start", "--pool", "local", "--type", "process"]
    with running(["prefect", "server", "start", "--port", str(port)], place / "server", known):
        wait_until_up(f"{url}/health")
        with running(worker, place / "elsewhere", known, place / "worker.log"):
            yield known


def wait_until_up(url: str) -> None:
    end = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, "the server did not start within three minutes"
            time.sleep(0.2)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No server in the environment; variables that a test sets are removed afterwards."""
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", server.RUN_SERVER):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("kept", [server.DEFAULT_PREFECT_UI, "https://prefect.example/here/"])
def test_the_page_of_a_run_is_on_the_server_that_was_started_for_it(
    bare: pytest.MonkeyPatch, tmp_path: Path, kept: str
) -> None:
    if kept != server.DEFAULT_PREFECT_UI:
        bare.setenv("PREFECT_UI_URL", kept)
    health = "http://127.0.0.1:34567/api/health"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    bare.setattr(server, "prefect_server", lambda *_: Service("prefect", ended, tmp_path / "log", health, 1.0))
    server.start_server(str(tmp_path))
    assert os.environ["PREFECT_UI_URL"] == kept
    link = f"{kept.rstrip('/')}/runs/flow-run/1"
    assert server.current_link(link) == "http://127.0.0.1:34567/runs/flow-run/1"


@pytest.mark.parametrize(
    ("api", "ui"),
    [
        ("http://127.0.0.1:42005/api", "http://127.0.0.1:42005"),  # its port has the usual one as prefix
        ("http://prefect:4200/api", server.DEFAULT_PREFECT_UI),  # docker/compose.yaml: browsers are outside
    ],
)
def test_links_to_any_other_server_are_unchanged(bare: pytest.MonkeyPatch, api: str, ui: str) -> None:
    bare.setenv("PREFECT_API_URL", api)
    bare.setenv("PREFECT_UI_URL", ui)
    server.start_server("unused")
    assert server.current_link(f"{ui}/runs/flow-run/1") == f"{ui}/runs/flow-run/1"


@pytest.mark.slow
def test_every_flow_runs_as_a_deployment(api: dict[str, str], place: Path, repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY, str(repo), "tiny.toml"],
        cwd=place,
        env=api,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = done.stdout.splitlines()
    assert "distill COMPLETED distilled version 1, alias challenger" in ended
    assert "prepare COMPLETED nothing to do" in ended
    assert "retry-shard COMPLETED 1 artifacts made" in ended
    assert any(line.startswith("score COMPLETED") for line in ended)
    names = [line for line in ended if line.startswith("task ")]
    assert names.count("task pack fr_meta_part_2-0000 COMPLETED") == 2
    assert names.count("task compute targets fr_meta_part_3-0000 COMPLETED") == 1
    assert not os.listdir(place / "elsewhere")
