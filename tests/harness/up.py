"""`distil up` as a user has it: started in a folder of its own, called over HTTP, and ended with all that it started.

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

READY = "Ctrl-C stops all of it"


@dataclass(frozen=True)
class Up:
    """A running `distil up` on the home `folder/home`; its output goes to the file `out`."""

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
        """POST to Prefect's API; the answer as plain values."""
        return request_json(f"{self.prefect}/api/{path}", body, headers)

    def run_deployment(self, name: str, headers: Mapping[str, str] | None = None, **parameters: Any) -> str:
        """Creates a run, as the Run button does; returns the id of the flow run."""
        flow, _, deployment = name.partition("/")
        wanted = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}}}
        (found,) = self.post("deployments/filter", wanted, headers)
        made = self.post(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters}, headers)
        return str(made["id"])

    def state(self, run: str, headers: Mapping[str, str] | None = None) -> str:
        """Name of a flow run's state."""
        (found,) = self.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}}, headers)
        return str(found["state"]["name"])

    def stop(self, signum: int) -> int:
        """Sends a signal to `up` alone; its exit status, negative for a signal."""
        self.process.send_signal(signum)
        return self.process.wait(LIMIT)


def request_json(url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that a server answers; raises HTTPError."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def start_up(folder: Path, environment: Mapping[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts `distil up ARGUMENTS` in a folder that is not the checkout; its output goes to folder/out."""
    (folder / "out").unlink(missing_ok=True)
    command = ["flows.cli", "up", *arguments]
    return start(command, folder, dict(environment) | {MARK: str(folder)}, folder / "out", start_new_session=True)


@contextmanager
def running_up(folder: Path, environment: Mapping[str, str], *recipes: Path) -> Iterator[Up]:
    """A `distil up` on the home `folder/home` that is ready; what remains of it afterwards is killed."""
    port, mlflow_port = free_port("Prefect", None), free_port("MLflow", None)
    ports = ("--port", str(port), "--mlflow-port", str(mlflow_port))
    process = start_up(folder, environment, *map(str, recipes), "--home", str(folder / "home"), *ports)
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
    """The processes of flow runs and what they started."""
    return [process for process in started_for(folder) if "PREFECT__FLOW_RUN_ID" in process.environ()]
