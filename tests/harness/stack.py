"""A Prefect server and process workers of a test's own, to be killed and started again, and runs of our flows on them.

with make_stack(folder) as stack:
    stack.start_worker()
    run = stack.start("distill", place, **{"train.max_steps": 5})
    stack.wait(run, "COMPLETED")
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType

from tasks.recipe.load import load_recipe
from tests.harness.place import REPO, Place, environment
from tests.harness.processes import started_for

POOL = "distil"
HUNG_SECONDS = 900.0
"""What has not come by then never comes; a busy machine takes minutes to import what a flow needs."""
MARK = "DISTIL_TEST_STACK"
"""In the environment of everything that a stack starts, and of all that comes from it."""
ENTRIES = {
    "distill": "flows/distill.py:distill",
    "prepare": "flows/prepare.py:prepare",
}


@dataclass
class Stack:
    """`database` is a URL for Prefect, or empty for SQLite below `folder`."""

    folder: Path
    port: int
    database: str = ""
    server: "subprocess.Popen[bytes] | None" = None
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(api=self.url)

    def start_server(self) -> None:
        """The same port and database every time."""
        settings = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_UI_ENABLED": "false"}
        if self.database:
            settings["PREFECT_API_DATABASE_CONNECTION_URL"] = self.database
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self._start(command, "server.log", settings)
        wait_for(self._answers)

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """A process worker in an empty folder that asks for work every second."""
        command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        worker = self._start(command, "worker.log", {"PREFECT_WORKER_QUERY_SECONDS": "1"})
        self.workers.append(worker)
        return worker

    def start(self, flow: str, place: Place, *settings: str) -> UUID:
        """A run of a deployment of this flow whose parameters are the place's recipe; returns the run's id."""
        recipe = load_recipe(place.recipe, settings).model_dump(mode="json", by_alias=True)
        with self.client as client:
            deployment = client.create_deployment(
                client.create_flow_from_name(flow),
                f"{recipe['name']}-{time.monotonic_ns()}",
                work_pool_name=POOL,
                entrypoint=ENTRIES[flow],
                # As in deployments/prefect.yaml. A `path` instead would have Prefect copy the checkout for every run.
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(REPO)}}],
                parameters={"recipe": recipe},
                enforce_parameter_schema=False,
            )
            return client.create_flow_run_from_deployment(deployment).id

    def run(self, run: UUID) -> FlowRun:
        with self.client as client:
            return client.read_flow_run(run)

    def set_state(self, run: UUID, kind: StateType, name: str, *, force: bool = False) -> None:
        """What a button of the UI does."""
        with self.client as client:
            client.set_flow_run_state(run, State(type=kind, name=name), force=force)

    def cancel(self, run: UUID) -> None:
        self.set_state(run, StateType.CANCELLING, "Cancelling")

    def retry(self, run: UUID) -> None:
        self.set_state(run, StateType.SCHEDULED, "AwaitingRetry")

    def wait(self, run: UUID, kind: str, seconds: float = HUNG_SECONDS) -> FlowRun:
        """Until the run ends. Fails if it ends in another state than `kind`."""
        wait_for(lambda: (state := self.run(run).state) is not None and state.is_final(), seconds)
        ended = self.run(run)
        assert ended.state
        assert ended.state.type.value == kind, f"{ended.state} {self.log('worker.log')}"
        return ended

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")[-6000:]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs because of this stack, but for its server."""
        server = self.server.pid if self.server else None
        return [process for process in started_for(MARK, self.folder) if process.pid != server]

    def flow_process(self) -> psutil.Process:
        """The process of the one flow that runs: the worker's child."""
        (process,) = (one for one in self.processes() if one.ppid() in {worker.pid for worker in self.workers})
        return process

    def _answers(self) -> bool:
        assert self.server
        assert self.server.poll() is None, self.log("server.log")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _start(self, module: list[str], log: str, settings: dict[str, str]) -> "subprocess.Popen[bytes]":
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        variables = environment(self.folder, self.url) | {MARK: str(self.folder)} | settings
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=elsewhere,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def make_stack(folder: Path, database: str = "") -> Iterator[Stack]:
    """A server with a work pool; all that it and its workers have started is ended afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stack = Stack(folder, port, database)
    try:
        stack.start_server()
        with stack.client as client:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        yield stack
    finally:
        for process in stack.processes():
            kill(process.pid)
        if stack.server:
            kill(stack.server.pid)
            stack.server.wait()
        for worker in stack.workers:
            worker.wait()


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_for(what: Callable[[], Any], seconds: float = HUNG_SECONDS) -> None:
    """Until `what()` is true; fails if that never comes."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
