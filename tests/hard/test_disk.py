"""Runs every stage on a full and on a read-only disk: the error is one sentence, and no incomplete artifact counts.

The same call must succeed once the disk is writable again. Only root may mount such a disk; the tests are skipped for
other users.
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
from tests.hard.stages import STAGES, Bench, make_bench
from tests.harness.mounts import mount, remount
from tests.harness.recipe_values import simple_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
MEGABYTE = 1 << 20
Bad = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 32 MB."""
    folder = tmp_path / "disk"
    mount(folder, "32m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # lazily: artifacts may still be mapped


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fills the disk completely inside the block."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(MEGABYTE)):
            pass
    assert shutil.disk_usage(disk).free == 0
    yield
    ballast.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Makes the disk read-only inside the block."""
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
    assert re.search("free some space|make it writable", said)
    assert {kind: bench.store.keys(kind) for kind in KINDS} == before
    assert verify(bench.store) == []
    call()
    assert verify(bench.store) == []
    assert not os.listdir(bench.store.scratch_folder)


def recipe_at(home: Path) -> Recipe:
    """Returns a recipe with an explicit MLflow database in its home, since MLflow keeps the last one in a variable."""
    uri = f"sqlite:///{home}/mlflow.db"
    return simple_recipe(home=str(home), register={"tracking_uri": uri})


def record(home: Path) -> None:
    """Writes a hundred runs to the MLflow database of a home."""
    mlflow_runs = open_mlflow_runs(recipe_at(home))
    for number in range(100):
        mlflow_runs.start_or_resume_run("chain", sha256_bytes(bytes([number])), "t", settings={"field": "x" * 4000})


@pytest.fixture
def database(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a home on the disk with a closed MLflow database of one experiment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that its value is restored after the test
    open_mlflow_runs(recipe_at(tmp_path))
    shutil.copy(tmp_path / "mlflow.db", disk / "mlflow.db")
    return disk


def test_mlflow_on_a_full_disk(database: Path) -> None:
    with (
        full(database),
        pytest.raises(FatalError, match=r"MLflow's database cannot be written \([^\n]*is full\); free space"),
    ):
        record(database)
    record(database)


def test_mlflow_on_a_read_only_disk(database: Path) -> None:
    with (
        read_only(database),
        pytest.raises(FatalError, match=r"MLflow's database cannot be written \([^\n]*readonly database\);"),
    ):
        record(database)
