"""A disk that is really full, or really read-only, under every stage: one sentence, nothing half made counts, and the
same call does it once space is free. Only root may mount such a disk; elsewhere these skip.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from flows.tracking.mlflow_runs import open_mlflow_runs
from storage.artifact import KINDS
from storage.errors import FatalError
from storage.fingerprint import sha256_bytes
from storage.store import Store
from storage.verify import verify
from tasks.recipe.config import Recipe
from tests.hard.bench import STAGES, Bench, make_bench
from tests.harness.mounts import mount, remount
from tests.harness.recipe_values import simple_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
MEGABYTE = 1 << 20
Bad = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    folder = tmp_path / "disk"
    mount(folder, "32m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # lazily: artifacts may still be mapped


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not one byte is left on it inside the block."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(MEGABYTE)):
            pass
    assert shutil.disk_usage(disk).free == 0
    yield
    ballast.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written on it inside the block."""
    remount(disk, "ro")
    yield
    remount(disk, "rw")


@pytest.fixture
def bench(disk: Path, tmp_path: Path) -> Bench:
    return make_bench(Store(disk / "store"), tmp_path)


@pytest.mark.parametrize("bad", [full, read_only], ids=["full", "read-only"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_takes_nothing(bench: Bench, disk: Path, stage: str, bad: Bad) -> None:
    call = STAGES[stage](bench)
    before = {kind: bench.store.keys(kind) for kind in KINDS}
    with bad(disk), pytest.raises(FatalError, match=r"is full|is read-only") as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert str(disk) in said
    assert re.search("make space there|make it writable", said)
    assert {kind: bench.store.keys(kind) for kind in KINDS} == before
    assert verify(bench.store) == []
    call()
    assert verify(bench.store) == []
    assert not os.listdir(bench.store.scratch_folder)


def recipe_at(home: Path) -> Recipe:
    """Its MLflow is a database below the home, by name: MLflow sets a variable, for all that come after."""
    uri = f"sqlite:///{home}/mlflow.db"
    return simple_recipe(home=str(home), register={"tracking_uri": uri})


def record(home: Path) -> None:
    """A hundred runs in the MLflow database of a home."""
    book = open_mlflow_runs(recipe_at(home))
    for number in range(100):
        book.run("chain", sha256_bytes(bytes([number])), "t", settings={"field": "x" * 4000})


@pytest.fixture
def database(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home on the disk with an MLflow database of one experiment, closed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # afterwards it is as before
    open_mlflow_runs(recipe_at(tmp_path))
    shutil.copy(tmp_path / "mlflow.db", disk / "mlflow.db")
    return disk


def test_mlflow_on_a_full_disk(database: Path) -> None:
    with full(database), pytest.raises(FatalError, match=r"MLflow's database .* make space there: [^\n]*is full$"):
        record(database)
    record(database)


def test_mlflow_on_a_read_only_disk(database: Path) -> None:
    with read_only(database), pytest.raises(FatalError, match=r"MLflow's database [^\n]*readonly database$"):
        record(database)
