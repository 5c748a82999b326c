"""A Prefect server for tests that run tasks in this process, an MLflow, and the `distil` command as users call it."""

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
from tasks.recipe.load import make_recipe
from tests.harness.place import Place, Result, make_place
from tests.harness.server import serving
from tests.harness.tiny import make_teacher, write_oscar

if TYPE_CHECKING:
    from flows.tracking.runs import MlflowRuns

Distil = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
name = "tiny"
[corpus]
url = "corpus"
heldout_per_mille = 100
[blocks]
length = 32
[teacher]
model = "teacher"
[student]
layers = 2
[train]
batch_rows = 16
max_steps = 40
checkpoint_steps = 20
validate_steps = 20
log_steps = 5
threads = 1
[score]
latency_runs = 1
sentences = ["Le juge <mask> le dossier."]
"""


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """A server with a database of its own, for flows and tasks that run in the test's process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> "MlflowRuns":
    """An MLflow of its own, on SQLite."""
    from flows.tracking.runs import open_mlflow_runs

    folder = tmp_path_factory.mktemp("mlflow")
    set_environment(str(folder))
    values = {"name": "tiny", "home": str(folder), "corpus": {"url": "x"}, "teacher": {"model": "y"}}
    return open_mlflow_runs(make_recipe(values, "test"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus, a random teacher and a recipe for both."""
    folder = tmp_path_factory.mktemp("place")
    torch.set_num_threads(1)
    write_oscar(folder / "corpus", parts=3, texts=60)
    make_teacher(folder / "teacher")
    (folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def environment(repo: Path) -> dict[str, str]:
    """Like a shell in which nobody has set up Prefect or MLflow."""
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


class Patient(httpx.HTTPTransport):
    """Asks again, as Prefect's own clients do, when the server answers that its SQLite is busy."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        end = time.monotonic() + 60
        while (answer := super().handle_request(request)).status_code == 503 and time.monotonic() < end:
            answer.close()
            time.sleep(0.5)
        return answer


class Stack(NamedTuple):
    """A Prefect server, and the place whose recipe `tiny` is deployed to it."""

    api: str
    place: Place

    def deploy(self, *arguments: str) -> Result:
        """`distil deploy recipe.toml ARGUMENTS` as a user runs it."""
        return self.place.distil("deploy", *arguments, server=self.api)

    def client(self) -> httpx.Client:
        """Speaks to the server as the UI does."""
        return httpx.Client(base_url=self.api, timeout=60, transport=Patient())

    def deployment(self, flow: str) -> dict[str, Any]:
        """The deployment FLOW/tiny as the server returns it."""
        with self.client() as client:
            answer = client.get(f"/deployments/name/{flow}/tiny")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def create_run(self, flow: str, parameters: dict[str, Any]) -> httpx.Response:
        """Asks for a run of FLOW/tiny."""
        with self.client() as client:
            path = f"/deployments/{self.deployment(flow)['id']}/create_flow_run"
            return client.post(path, json={"parameters": parameters})

    def recipe(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """The recipe as the form is filled at first, with some fields changed: `recipe(train={"lr": 7})`."""
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
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server to which one recipe has been deployed."""
    folder = tmp_path_factory.mktemp("stack")
    write_oscar(folder / "corpus")
    make_teacher(folder / "teacher")
    place = make_place(folder, folder / "corpus", folder / "teacher")
    with place.recipe.open("a", encoding="utf-8") as recipe:
        recipe.write('\n[watch]\ncron = "17 3 * * *"\nactive = true\n')
    with serving(folder / "server") as api:
        stack = Stack(api, place)
        done = stack.deploy()
        assert done.status == 0, done.err
        yield stack
