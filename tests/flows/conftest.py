"""A Prefect server for flows in the test's process, an MLflow, the `distil` command, and a server with deployments."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
import torch

from flows.home import set_environment
from tests.harness.project import Project, Result, make_project
from tests.harness.recipe_values import recipe_toml, simple_recipe
from tests.harness.servers.prefect_server import serving
from tests.harness.tiny import make_teacher, write_oscar

if TYPE_CHECKING:
    from flows.tracking.mlflow_runs import MlflowRuns

Distil = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE: dict[str, Any] = {
    "corpus": {"url": "corpus", "shard_bytes": 10_000_000},  # one shard per source
    "teacher": "teacher",
    "train": {"batch_rows": 16, "max_steps": 40, "checkpoint_steps": 20, "validate_steps": 20, "log_steps": 5},
    "score": {"latency_runs": 1, "sentences": ["Le juge <mask> le dossier."]},
}
"""The changes that the recipe of `place` makes to a tiny one."""


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """A server with a database of its own, for flows and tasks that run in the test's process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def mlflow_runs(tmp_path_factory: pytest.TempPathFactory) -> "MlflowRuns":
    """An MLflow of its own, on SQLite."""
    from flows.tracking.mlflow_runs import open_mlflow_runs

    folder = tmp_path_factory.mktemp("mlflow")
    set_environment(str(folder))
    return open_mlflow_runs(simple_recipe(home=str(folder)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus, a random teacher and a recipe for both."""
    folder = tmp_path_factory.mktemp("place")
    torch.set_num_threads(1)
    write_oscar(folder / "corpus", parts=3, texts=60)
    make_teacher(folder / "teacher")
    (folder / "tiny.toml").write_text(recipe_toml(**RECIPE), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def environment(repo: Path) -> dict[str, str]:
    """The environment of a shell without variables of Prefect and MLflow."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return known | {"PYTHONPATH": str(repo), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def distil(place: Path, environment: dict[str, str]) -> Distil:
    """Calls `distil` in the place; both outputs are text."""

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return call


class RetryingTransport(httpx.HTTPTransport):
    """Repeats a request, as Prefect's own clients do, when the server answers that its SQLite is busy."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        end = time.monotonic() + 60
        while (answer := super().handle_request(request)).status_code == 503 and time.monotonic() < end:
            answer.close()
            time.sleep(0.5)
        return answer


class DeployedRecipe(NamedTuple):
    """A Prefect server, and the project whose recipe `tiny` is deployed to it."""

    api: str
    project: Project

    def deploy(self, *arguments: str) -> Result:
        """`distil deploy recipe.toml ARGUMENTS` as a user runs it."""
        return self.project.distil("deploy", *arguments, server=self.api)

    def client(self) -> httpx.Client:
        """An HTTP client of the server's API, as the UI has one."""
        return httpx.Client(base_url=self.api, timeout=60, transport=RetryingTransport())

    def deployment(self, flow: str) -> dict[str, Any]:
        """The deployment FLOW/tiny as the server returns it."""
        with self.client() as client:
            answer = client.get(f"/deployments/name/{flow}/tiny")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def create_run(self, flow: str, parameters: dict[str, Any]) -> httpx.Response:
        """Requests a run of FLOW/tiny."""
        with self.client() as client:
            path = f"/deployments/{self.deployment(flow)['id']}/create_flow_run"
            return client.post(path, json={"parameters": parameters})

    def recipe(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """The recipe that the form is filled with, with some fields changed: `recipe(train={"lr": 7})`."""
        filled: dict[str, Any] = self.deployment("distill")["parameters"]["recipe"]
        return filled | {name: filled[name] | fields for name, fields in sections.items()}

    def run_state(self, run: str) -> dict[str, Any]:
        """The state of a run."""
        with self.client() as client:
            return dict(client.get(f"/flow_runs/{run}").json()["state"])

    def ended(self, run: str, seconds: float = 180) -> dict[str, Any]:
        """The state that a run ended in."""
        end = time.monotonic() + seconds
        while (state := self.run_state(run))["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < end, state
            time.sleep(0.3)
        return state


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedRecipe]:
    """A server to which one recipe has been deployed."""
    folder = tmp_path_factory.mktemp("deployed")
    make_teacher(folder / "teacher")
    watch = {"cron": "17 3 * * *", "active": True}
    place = make_project(folder, write_oscar(folder / "corpus"), folder / "teacher", watch=watch)
    with serving(folder / "server") as server:
        deployed = DeployedRecipe(server.url, place)
        done = deployed.deploy()
        assert done.status == 0, done.err
        yield deployed
