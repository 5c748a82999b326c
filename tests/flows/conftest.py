"""A Prefect server for tests that run tasks in this process, and the `distil` command as users call it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import make_teacher, write_oscar

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
