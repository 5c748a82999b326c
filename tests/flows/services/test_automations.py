"""The automations of `distil deploy` on a real server: dead runs become Crashed, failed ones cause a notification."""

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.flows.conftest import DeployedRecipe
from tests.harness.output import refusal
from tests.harness.servers.prefect_server import working

pytestmark = pytest.mark.slow

TWO_MINUTES = 120.0


@contextmanager
def listening() -> Iterator[tuple[str, "queue.Queue[dict[str, Any]]"]]:
    """A web server on loopback: its URL and what is posted to it."""
    posted: queue.Queue[dict[str, Any]] = queue.Queue()

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """No output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Ear) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", posted
        server.shutdown()


def fail(deployed: DeployedRecipe, run: str, message: str) -> None:
    """Puts a run into the state Failed, as a flow does at its end."""
    with deployed.client() as client:
        state = {"type": "FAILED", "name": "Failed", "message": message}
        client.post(f"/flow_runs/{run}/set_state", json={"state": state, "force": True}).raise_for_status()


def test_a_failed_run_is_notified_through_a_block(deployed: DeployedRecipe) -> None:
    """Only runs with the tag `distil`: the run of another flow fails first and is not reported."""
    with listening() as (url, posted), deployed.client() as client:
        with temporary_settings({PREFECT_API_URL: deployed.api}):
            text = {"title": "{{subject}}", "text": "{{body}}"}
            CustomWebhookNotificationBlock(name="on-call", url=url, json_data=text).save("on-call")
        for _ in range(2):
            assert deployed.deploy("--notify", "custom-webhook/on-call").status == 0
        automations = client.post("/automations/filter", json={}).json()
        assert [one["name"] for one in automations].count("distil: tell of failures") == 1
        theirs = client.post("/flows/", json={"name": "theirs"}).json()["id"]
        fail(deployed, client.post("/flow_runs/", json={"flow_id": theirs}).json()["id"], "not ours")
        fail(deployed, deployed.create_run("score", {}).json()["id"], "no such model: x; name a folder")
        first = posted.get(timeout=60)
    assert first["title"].startswith("score/")
    assert first["title"].endswith(": Failed")
    assert first["text"].startswith("no such model: x; name a folder\n")
    assert "/runs/flow-run/" in first["text"]
    assert posted.empty()


@pytest.mark.parametrize(
    ("block", "message"), [("slack-webhook/nobody", "has no block slack-webhook/nobody"), ("oops", "has no block oops")]
)
def test_a_missing_block_is_named(deployed: DeployedRecipe, block: str, message: str) -> None:
    assert message in refusal(deployed.deploy("--notify", block))


def test_a_block_that_cannot_notify_is_named(deployed: DeployedRecipe) -> None:
    from prefect.blocks.system import Secret

    with temporary_settings({PREFECT_API_URL: deployed.api}):
        Secret(value="x").save("quiet")
    assert "the block secret/quiet cannot send notifications" in refusal(deployed.deploy("--notify", "secret/quiet"))


@pytest.mark.guard
def test_a_run_killed_with_its_worker_is_crashed_within_two_minutes(deployed: DeployedRecipe, tmp_path: Path) -> None:
    """The next run of the queue, which was blocked, may start then."""
    endless = deployed.recipe(train={"max_steps": 1_000_000})
    run = deployed.create_run("distill", {"recipe": endless}).json()["id"]
    with working(tmp_path / "worker", deployed.api, "distil") as worker:
        wait_for_heartbeat(deployed, run)
        family = psutil.Process(worker.pid).children(recursive=True)
        for process in (psutil.Process(worker.pid), *family):
            if process.is_running():
                process.kill()
    assert deployed.run_state(run)["type"] == "RUNNING"
    following = deployed.create_run("distill", {}).json()["id"]
    assert due(deployed) == []
    state = deployed.ended(run, TWO_MINUTES)
    assert state["type"] == "CRASHED"
    assert "sent no heartbeat for 90 seconds" in state["message"]
    assert due(deployed) == [following]
    with deployed.client() as client:
        client.delete(f"/flow_runs/{following}").raise_for_status()


def due(deployed: DeployedRecipe) -> list[str]:
    """The runs that the queue `distill` would give a worker now."""
    with deployed.client() as client:
        body = {"work_queue_names": ["distill"]}
        runs = client.post("/work_pools/distil/get_scheduled_flow_runs", json=body).json()
    return [run["flow_run"]["id"] for run in runs]


def wait_for_heartbeat(deployed: DeployedRecipe, run: str) -> None:
    """Returns when the server has received a heartbeat of the run."""
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "any_resource": {"id": [f"prefect.flow-run.{run}"]}}
    end = time.monotonic() + 180
    with deployed.client() as client:
        while not client.post("/events/filter", json={"filter": wanted}).json()["events"]:
            assert time.monotonic() < end, deployed.run_state(run)
            time.sleep(0.3)
