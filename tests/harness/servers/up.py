"""Runs `distil up` as a user does: starts it in a separate folder, calls it over HTTP, and ends all its processes.

with running_up(folder, environment, recipe) as up:
    up.post("flow_runs/filter", {})          # Prefect's API
    up.stop(signal.SIGINT)
"""

import json
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.services.process import free_port
from tests.harness.processes import LIMIT, MARK, kill, start, started_for, wait_for

READY = "press Ctrl-C to stop all services"


@dataclass(frozen=True)
class Up:
    """A running `distil up` with the home `folder/home`; its output is in the file `out`."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    out: Path
    port: int
    mlflow_port: int

    @property
    def output(self) -> str:
        return self.out.read_text(encoding="utf-8")

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """Sends a POST request to Prefect's API. Returns the response as plain values."""
        return request_json(f"{self.prefect}/api/{path}", body, headers)

    def run_deployment(self, name: str, headers: Mapping[str, str] | None = None, **parameters: Any) -> str:
        """Creates a run, as the Run button does. Returns the id of the flow run."""
        flow, _, deployment = name.partition("/")
        wanted = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}}}
        (found,) = self.post("deployments/filter", wanted, headers)
        made = self.post(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters}, headers)
        return str(made["id"])

    def state(self, run: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the name of a flow run's state."""
        (found,) = self.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}}, headers)
        return str(found["state"]["name"])

    def stop(self, signum: int) -> int:
        """Sends a signal to the `up` process only. Returns its exit status; a negative status is a signal number."""
        self.process.send_signal(signum)
        return self.process.wait(LIMIT)


def request_json(url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """Returns the JSON response of a server. HTTPError if the request fails."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def start_up(folder: Path, environment: Mapping[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts `distil up ARGUMENTS` in a folder outside the checkout; its output is written to folder/out."""
    (folder / "out").unlink(missing_ok=True)
    command = ["flows.cli", "up", *arguments]
    return start(command, folder, dict(environment) | {MARK: str(folder)}, folder / "out", start_new_session=True)


@contextmanager
def running_up(folder: Path, environment: Mapping[str, str], *recipes: Path, home: str = "home") -> Iterator[Up]:
    """Runs `distil up` with the home `folder/home`, and kills its remaining processes afterwards.

    An empty `home` leaves the home to the recipes. The block starts once the services are ready.
    """
    port, mlflow_port = free_port("Prefect", None), free_port("MLflow", None)
    ports = ("--port", str(port), "--mlflow-port", str(mlflow_port))
    homes = ("--home", str(folder / home)) if home else ()
    process = start_up(folder, environment, *map(str, recipes), *homes, *ports)
    up = Up(folder, process, folder / "out", port, mlflow_port)
    try:
        wait_for(lambda: READY in up.output or process.poll() is not None)
        assert READY in up.output, up.output
        yield up
    finally:
        process.kill()
        process.wait()
        for one in started_for(folder):
            kill(one.pid)


def flow_processes(folder: Path) -> list[psutil.Process]:
    """Returns the processes of flow runs and all processes that they started."""
    return [process for process in started_for(folder) if "PREFECT__FLOW_RUN_ID" in process.environ()]
