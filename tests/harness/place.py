"""A small project folder and the `distil` command on it, run as a user would run it: from another folder.

place = make_place(folder, corpus, teacher)
result = place.distil("run", "train.max_steps=5")       # a process of its own
place.stamps()                                          # what is in the store, and when it was made
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from storage.artifact import KINDS, Receipt
from storage.store import Store

REPO = Path(__file__).resolve().parents[2]
BROKEN = "fr_meta_part_2.jsonl.zst"
"""The source that is cut short in the first run of the history."""
LENGTH = 32
STEPS = 20
MARK = "DISTIL_TEST_PLACE"
"""In the environment of everything that is started for a place: the folder of the place."""
LIMIT = 300.0
"""Seconds after which a command is taken for hung."""

RECIPE = """
name = "tiny"
home = {home}

[corpus]
url = {corpus}
heldout_per_mille = 100
shard_bytes = 10_000

[blocks]
length = {length}

[teacher]
model = {teacher}

[student]
layers = 2

[train]
batch_rows = 6
max_steps = {steps}
lr = 1e-3
checkpoint_steps = 4
validate_steps = 10
validate_rows = 8
log_steps = 1
threads = 1
device = "cpu"

[score]
heldout_rows = 16
latency_runs = 0

[run]
workers = {workers}
"""

Stamp = tuple[str, str, str]
"""Kind, label and key of an artifact."""


class Result(NamedTuple):
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """A folder with recipe.toml and home/; nothing else of it is used."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def store(self) -> Store:
        return Store(self.home / "store")

    @property
    def mlflow(self) -> str:
        return f"sqlite:///{self.home}/mlflow/mlflow.db"

    def start(self, command: str, *arguments: str, server: str = "", **options: Any) -> subprocess.Popen[str]:
        """Starts `distil COMMAND RECIPE ARGUMENTS` in an empty folder; without a server it brings its own."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", command, str(self.recipe), *arguments],
            cwd=elsewhere,
            env=environment(self.folder, server),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def distil(self, command: str, *arguments: str, server: str = "") -> Result:
        """Runs the command to its end."""
        return ended(self.start(command, *arguments, server=server))

    def receipts(self, *kinds: str) -> list[Receipt]:
        """Receipts of these kinds."""
        return [receipt for kind in kinds for receipt in self.store.receipts(kind)]

    def stamps(self) -> dict[Stamp, str]:
        """When each artifact in the store was made."""
        return {(one.kind, one.label, one.key): one.created for one in self.receipts(*KINDS)}

    def copy(self, folder: Path, *, corpus: Path | None = None, without: tuple[str, ...] = ()) -> "Place":
        """A place with a copy of this one's store, less all artifacts of some kinds."""
        shutil.copytree(self.home / "store", folder / "home" / "store")
        for kind in without:
            for part in ("data", "receipts"):
                shutil.rmtree(folder / "home" / "store" / part / kind, ignore_errors=True)
        text = self.recipe.read_text(encoding="utf-8")
        text = text.replace(json.dumps(str(self.home)), json.dumps(str(folder / "home")))
        if corpus:
            text = text.replace(json.dumps(str(self.folder / "corpus")), json.dumps(str(corpus)))
        place = Place(folder)
        place.recipe.write_text(text, encoding="utf-8")
        return place


Shell = Callable[..., Result]
"""Runs one `distil` command, given its arguments."""


@dataclass(frozen=True)
class History:
    """`distil run` three times in one place: with a source that is cut short, mended, and once more."""

    place: Place
    broken: Result
    broken_stamps: dict[Stamp, str]
    whole: Result
    whole_stamps: dict[Stamp, str]
    again: Result
    again_stamps: dict[Stamp, str]


def make_place(folder: Path, corpus: Path, teacher: Path, workers: int = 2) -> Place:
    """A place with nothing in its store."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder)
    names = {"home": place.home, "corpus": corpus, "teacher": teacher}
    quoted = {name: json.dumps(str(path)) for name, path in names.items()}
    place.recipe.write_text(RECIPE.format(**quoted, length=LENGTH, steps=STEPS, workers=workers), encoding="utf-8")
    return place


def run_folder_of(place: Place) -> Path:
    """The folder of the one training run of a place."""
    (folder,) = (path.parent for path in (place.home / "run").glob("*/run.json"))
    return folder


def environment(folder: Path, server: str = "") -> dict[str, str]:
    """The user's environment without what he may have set for Prefect and MLflow; nothing asks the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    if server:
        kept |= {"PREFECT_API_URL": server, "PREFECT_HOME": str(folder / "prefect-home")}
    return kept | {
        MARK: str(folder),
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def ended(process: subprocess.Popen[str]) -> Result:
    """Waits for the command and returns what it said."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, out, err)


def tables(out: str) -> list[list[str]]:
    """The rows of all tables between two rules. Long words are folded in them, so cells come without white space."""
    rows: list[list[str]] = []
    inside = False
    for line in out.splitlines():
        cells = ["".join(cell.split()) for cell in re.split("[│┃]", line)[1:-1]]
        if cells and inside:
            rows[-1] = [before + cell for before, cell in zip(rows[-1], cells, strict=True)]
        elif cells:
            rows.append(cells)
        inside = bool(cells)
    return rows


def refusal(result: Result) -> str:
    """The one sentence of a command that was refused. Fails unless status is 1 and there is no traceback."""
    assert result.status == 1, result
    assert "Traceback" not in result.out + result.err
    said = [line for line in result.err.splitlines() if line.startswith("distil: ")]
    assert len(said) == 1, result.err
    return said[0]


@contextmanager
def running(
    module: list[str], folder: Path, variables: dict[str, str], said: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python module as a process that says all into a file, folder/log if not told otherwise; it and its children are
    ended afterwards."""
    folder.mkdir(exist_ok=True)
    with (said or folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in family:
            if child.is_running():
                child.kill()


def made(before: Mapping[Stamp, str], after: Mapping[Stamp, str], *kinds: str) -> set[tuple[str, str]]:
    """Kind and label of what was made, or made again, between two looks; of these kinds, or of all."""
    fresh = {stamp for stamp, created in after.items() if before.get(stamp) != created}
    return {(kind, label) for kind, label, _ in fresh if not kinds or kind in kinds}


def mount(folder: Path, size: str) -> None:
    """An empty file system in memory, of 128k or 32m, at a new folder. Skips where that may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "distil-test", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")


def remount(folder: Path, options: str) -> None:
    """Changes the size or the mode of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
