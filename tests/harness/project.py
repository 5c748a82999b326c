"""Makes small project folders and runs the `distil` command on them from a different folder, as a user may.

project = make_project(folder, corpus, teacher)
result = project.distil("run", "train.max_steps=5")       # in a separate process
project.creation_times()                                          # creation time of each artifact in the store
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from storage.artifact import KINDS, Receipt
from storage.store import Store
from tests.harness.processes import LIMIT, MARK
from tests.harness.recipe_values import recipe_toml

REPO = Path(__file__).resolve().parents[2]
TRUNCATED = "fr_meta_part_2.jsonl.zst"
"""The source that is truncated in the first run of a `History`."""

Stamp = tuple[str, str, str]
"""Kind, label and key of an artifact."""


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Project:
    """A project folder with recipe.toml and home/."""

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
        """Starts `distil COMMAND RECIPE ARGUMENTS` in an empty folder; without `server`, it starts a Prefect server."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "flows.cli", command, str(self.recipe), *arguments]
        return start_program(words, elsewhere, environment(self.folder, server), **options)

    def distil(self, command: str, *arguments: str, server: str = "") -> Result:
        """Runs the command and waits until it has ended."""
        return ended(self.start(command, *arguments, server=server))

    def receipts(self, *kinds: str) -> list[Receipt]:
        """Returns the receipts of these kinds of artifacts."""
        return [receipt for kind in kinds for receipt in self.store.receipts(kind)]

    def creation_times(self) -> dict[Stamp, str]:
        """Returns the creation time of each artifact in the store."""
        return {(one.kind, one.label, one.key): one.created for one in self.receipts(*KINDS)}

    def copy(self, folder: Path, *, corpus: Path | None = None, without: tuple[str, ...] = ()) -> "Project":
        """Makes a project with a copy of this store, except all artifacts of the kinds `without`."""
        shutil.copytree(self.home / "store", folder / "home" / "store")
        for kind in without:
            for part in ("data", "receipts"):
                shutil.rmtree(folder / "home" / "store" / part / kind, ignore_errors=True)
        text = self.recipe.read_text(encoding="utf-8")
        text = text.replace(json.dumps(str(self.home)), json.dumps(str(folder / "home")))
        if corpus:
            text = text.replace(json.dumps(str(self.folder / "corpus")), json.dumps(str(corpus)))
        project = Project(folder)
        project.recipe.write_text(text, encoding="utf-8")
        return project


Shell = Callable[..., Result]
"""Runs one `distil` command with the arguments that are passed."""


@dataclass(frozen=True)
class History:
    """Results of three runs of `distil run`: with a truncated source, with the complete one, and once more."""

    project: Project
    truncated: Result
    truncated_times: dict[Stamp, str]
    complete: Result
    complete_times: dict[Stamp, str]
    repeated: Result
    repeated_times: dict[Stamp, str]


def make_project(folder: Path, corpus: Path, teacher: Path, **changes: Any) -> Project:
    """Makes a project with an empty store; `changes` are changes of recipe sections, such as `run={"workers": 3}`."""
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    text = recipe_toml(home=project.home, corpus=corpus, teacher=teacher, **changes)
    project.recipe.write_text(text, encoding="utf-8")
    return project


def run_folder_of(project: Project) -> Path:
    """Returns the folder of the only training run of a project."""
    (folder,) = (path.parent for path in (project.home / "run").glob("*/run.json"))
    return folder


def environment(folder: Path, server: str = "") -> dict[str, str]:
    """Returns the environment of this process without Prefect and MLflow variables, and with the hub offline."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    if server:
        kept |= {"PREFECT_API_URL": server, "PREFECT_HOME": str(folder / "prefect-home")}
    return kept | {
        MARK: str(folder),
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def start_program(
    words: Sequence[str | Path], folder: Path, variables: Mapping[str, str], **options: Any
) -> subprocess.Popen[str]:
    """Starts a program in a folder, as from a terminal there; `ended` returns its output."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen[str]) -> Result:
    """Waits until the command has ended. Returns its status and output."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, out, err)


def new_artifacts(before: Mapping[Stamp, str], after: Mapping[Stamp, str], *kinds: str) -> set[tuple[str, str]]:
    """Returns kind and label of the artifacts that were made, or made again, between two calls of `creation_times`."""
    fresh = {stamp for stamp, created in after.items() if before.get(stamp) != created}
    return {(kind, label) for kind, label, _ in fresh if not kinds or kind in kinds}
