"""Runs a Prefect server for a test, with workers and flow runs; server and workers can be killed and restarted.

with serving(folder) as server:                 # with SQLite in the folder, unless `database` is a URL
    server.start_worker()
    run = server.create_run("distill", project, "train.max_steps=5")
    server.wait(run, "COMPLETED")
"""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.services.process import free_port
from tasks.recipe.load import load_recipe
from tests.harness.processes import LIMIT, kill, running, start, started_for, wait_for
from tests.harness.project import REPO, Project, environment

POOL = "distil"
ENTRIES = {
    "distill": "flows/distill.py:distill",
    "prepare": "flows/prepare.py:prepare",
}


@dataclass
class PrefectServer:
    """A Prefect server and its workers, with state and logs in `folder`.

    `database` is a URL, or empty for SQLite in the folder.
    """

    folder: Path
    port: int
    database: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(api=self.url)

    # ---- the server and its workers ----------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the server, always on the same port and database, and waits until it responds."""
        settings = {
            "PREFECT_HOME": str(self.folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_UI_URL": self.url.removesuffix("/api"),  # links in notifications
            "DO_NOT_TRACK": "1",
        }
        if self.database:
            settings["PREFECT_API_DATABASE_CONNECTION_URL"] = self.database
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        variables = environment(self.folder) | settings | dict(self.variables)
        self.process = start(command, self.folder / "elsewhere", variables, self.folder / "server.log")
        try:
            wait_for(self._answers, process=self.process)
        except AssertionError as error:
            raise AssertionError(f"the Prefect server does not respond: {self.log('server.log')}") from error

    def kill(self) -> None:
        """Sends SIGKILL to the server only, and waits until it has ended."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def create_pool(self, pool: str = POOL) -> None:
        """Creates a work pool of the type process."""
        with self.client as client:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))

    def start_worker(self, pool: str = POOL) -> "subprocess.Popen[bytes]":
        """Starts a process worker, which polls for runs every second, in an empty folder."""
        variables = worker_environment(self.folder, self.url)
        worker = start(worker_command(pool), self.folder / "elsewhere", variables, self.folder / "worker.log")
        self.workers.append(worker)
        return worker

    def ensure_worker(self) -> None:
        """Starts a worker unless the last one is still running."""
        if not self.workers or self.workers[-1].poll() is not None:
            self.start_worker()

    def log(self, name: str) -> str:
        """Returns the last 6,000 characters of a log file."""
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")[-6000:]

    def processes(self) -> list[psutil.Process]:
        """Returns all processes that were started for this server or by its workers, except the server."""
        server = self.process.pid if self.process else None
        return [process for process in started_for(self.folder) if process.pid != server]

    def flow_process(self) -> psutil.Process:
        """Returns the process of the only running flow: the child of a worker."""
        (process,) = (one for one in self.processes() if one.ppid() in {worker.pid for worker in self.workers})
        return process

    # ---- flow runs ---------------------------------------------------------------------------------------------

    def create_run(self, flow: str, project: Project, *settings: str) -> UUID:
        """Deploys the flow with the project's recipe as its parameter and creates a run. Returns the id of the run."""
        recipe = load_recipe(project.recipe, settings).model_dump(mode="json", by_alias=True)
        with self.client as client:
            deployment = client.create_deployment(
                client.create_flow_from_name(flow),
                f"{recipe['name']}-{time.monotonic_ns()}",
                work_pool_name=POOL,
                entrypoint=ENTRIES[flow],
                # As in deployments/prefect.yaml. With a `path`, Prefect would copy the checkout for every run.
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(REPO)}}],
                parameters={"recipe": recipe},
                enforce_parameter_schema=False,
            )
            return client.create_flow_run_from_deployment(deployment).id

    def read_run(self, run: UUID) -> FlowRun:
        with self.client as client:
            return client.read_flow_run(run)

    def set_state(self, run: UUID, kind: StateType, name: str, *, force: bool = False) -> None:
        """Sets a run's state, as a button of the UI does."""
        with self.client as client:
            client.set_flow_run_state(run, State(type=kind, name=name), force=force)

    def cancel(self, run: UUID) -> None:
        self.set_state(run, StateType.CANCELLING, "Cancelling")

    def retry(self, run: UUID) -> None:
        self.set_state(run, StateType.SCHEDULED, "AwaitingRetry")

    def wait(self, run: UUID, kind: str, seconds: float = LIMIT) -> FlowRun:
        """Returns the run once it has ended. Fails if it ends in a different state from `kind`."""
        wait_for(lambda: (state := self.read_run(run).state) is not None and state.is_final(), seconds)
        ended = self.read_run(run)
        assert ended.state
        log = self.log("worker.log") if self.workers else ""
        assert ended.state.type.value == kind, f"{ended.state} {log}"
        return ended

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(folder: Path, variables: Mapping[str, str] | None = None, database: str = "") -> Iterator[PrefectServer]:
    """Runs a server on a free loopback port; afterwards kills it, its workers and all processes that they started."""
    folder.mkdir(parents=True, exist_ok=True)
    server = PrefectServer(folder, free_port("Prefect", None), database, variables or {})
    try:
        server.start()
        yield server
    finally:
        for process in started_for(folder):
            kill(process.pid)
        for child in (server.process, *server.workers):
            if child:
                child.kill()
                child.wait()


@contextmanager
def working(folder: Path, url: str, pool: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a process worker of any server inside the block."""
    with running(worker_command(pool), folder, worker_environment(folder, url)) as process:
        yield process


def worker_command(pool: str) -> list[str]:
    return ["prefect", "worker", "start", "--pool", pool, "--type", "process"]


def worker_environment(folder: Path, url: str) -> dict[str, str]:
    return environment(folder, url) | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
