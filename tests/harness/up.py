"""`distil up` as a user has it, for tests: started in a folder of its own, asked over HTTP, and nothing of it left.

with running(folder, environment, recipe) as up:
    up.post("flow_runs/filter", {})          # Prefect's API
    up.stop(signal.SIGINT)
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.services.process import free_port
from tests.harness.processes import started_for

MARK = "DISTIL_TEST_UP"
"""In the environment of everything that a test starts, so that it is found wherever it hangs in the tree."""
LIMIT = 300.0
"""Seconds; on a busy machine a start takes more than one minute."""
READY = "Ctrl-C stops all of it"


@dataclass(frozen=True)
class Up:
    """A running `distil up` on the home `folder/home`; what it says is in `out`."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    out: Path
    port: int
    mlflow_port: int

    @property
    def said(self) -> str:
        return self.out.read_text(encoding="utf-8")

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """POST to Prefect's API; the answer as plain values."""
        return ask(f"http://127.0.0.1:{self.port}/api/{path}", body, headers)

    def run_deployment(self, name: str, headers: Mapping[str, str] | None = None, **parameters: Any) -> str:
        """What the Run button does; returns the id of the new flow run."""
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


def ask(url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that a server answers; raises HTTPError."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def launched(folder: Path, environment: Mapping[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts `distil up ARGUMENTS` in a folder that is not the checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", *arguments],
            cwd=folder,
            env=dict(environment) | {MARK: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def running(folder: Path, environment: Mapping[str, str], recipe: Path) -> Iterator[Up]:
    """Waits until all is up; ends what is left of it afterwards."""
    port, mlflow_port = free_port("Prefect", None), free_port("MLflow", None)
    ports = ("--port", str(port), "--mlflow-port", str(mlflow_port))
    process = launched(folder, environment, str(recipe), "--home", str(folder / "home"), *ports)
    up = Up(folder, process, folder / "out", port, mlflow_port)
    try:
        wait_for(lambda: READY in up.said or process.poll() is not None)
        assert READY in up.said, up.said
        yield up
    finally:
        process.kill()
        process.wait()
        for one in left(folder):
            one.kill()


def left(folder: Path) -> list[psutil.Process]:
    """Every process that was started for this folder and is still there."""
    return started_for(MARK, folder)


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, f"it did not happen within {LIMIT:g} seconds"
        time.sleep(0.1)


def flow_processes(folder: Path) -> list[psutil.Process]:
    """The processes of flow runs and what they started."""
    return [process for process in left(folder) if "PREFECT__FLOW_RUN_ID" in process.environ()]


def kill(process: psutil.Process) -> None:
    """SIGKILL, as from the kernel when memory runs out."""
    os.kill(process.pid, signal.SIGKILL)
