"""Kills a tiny pipeline at a crash point, runs it again to its end, and compares the result with an undisturbed run.

    python -m tests.hard.crash.matrix --all --random 30         all crash points, and 30 random times
    python -m tests.hard.crash.matrix --points 40               40 crash points of all kinds
    python -m tests.hard.crash.matrix --list, then --at "POINT"

points.py defines the crash points. An undisturbed run provides their list and the artifacts to compare with. A
`KillTrial` is one killed run and its repetition; each has its own home; all share corpus, teacher and Prefect server.
The kills alternate between all processes of the pipeline and only the process that reached the crash point. After a
kill, no process may remain and no incomplete artifact may count as finished. After the repeated run, `verify` must find
no fault, the artifacts must be those of the undisturbed run, no work may remain, and MLflow must contain each run once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from mlflow.tracking import MlflowClient

from flows.pipeline.already_done import all_done
from storage.artifact import DataFile
from storage.verify import verify
from tasks.lineage import Workspace
from tasks.recipe.load import load_recipe
from tests.hard.crash import points
from tests.hard.reliability import record
from tests.harness.processes import MARK, started_for
from tests.harness.project import REPO, Project, environment, make_project
from tests.harness.servers.prefect_server import serving
from tests.harness.tiny import make_teacher, write_oscar

STEPS = 8
END_SECONDS = 120.0
"""Time within which the remaining processes of a killed pipeline must end."""
Files = Mapping[tuple[str, str, str], tuple[DataFile, ...]]


@dataclass(frozen=True)
class KillTrial:
    """One killed run and its repetition.

    `at` is a crash point, or the seconds after the start; `target` is "all" or "one" (process); `killed` is True if the
    run was killed there; `faults` lists the errors found afterwards.
    """

    at: str
    target: str
    killed: bool
    seconds: float
    faults: tuple[str, ...]


@dataclass
class Matrix:
    """The inputs and processes that all trials share."""

    folder: Path
    forker: "subprocess.Popen[str]"
    database: Path
    points: list[str] = field(default_factory=list)
    files: Files = field(default_factory=dict)
    seconds: float = 0.0

    def project(self, name: str) -> Project:
        """Makes a project whose home contains only an empty MLflow database, which is copied to save seconds."""
        project = make_project(
            self.folder / name,
            self.folder / "corpus",
            self.folder / "teacher",
            train={"max_steps": STEPS, "validate_steps": 4},
            run={"workers": 1, "retry_seconds": 0},
        )
        (project.home / "mlflow").mkdir(parents=True)
        shutil.copy(self.database, project.home / "mlflow" / "mlflow.db")
        return project

    def run(
        self, project: Project, hook: Mapping[str, str] | None = None, meanwhile: Callable[[int], object] | None = None
    ) -> int:
        """Runs `distil run` until it ends and returns its status. `meanwhile` is called with the flow's process id."""
        variables = {MARK: str(project.folder), **(hook or {})}
        asked = {"arguments": ["run", str(project.recipe)], "folder": str(project.folder), "variables": variables}
        assert self.forker.stdin
        print(json.dumps(asked), file=self.forker.stdin, flush=True)
        pid = self._answer()["pid"]
        if meanwhile:
            meanwhile(pid)
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, Any]:
        assert self.forker.stdout
        line = self.forker.stdout.readline()
        if not line:
            log = (self.folder / "commands.log").read_text(encoding="utf-8")
            raise RuntimeError(f"the process tests.hard.crash.forked_commands ended: {log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def matrix(folder: Path) -> Iterator[Matrix]:
    """Provides teacher, corpus, server and the process of forked_commands.py, after one undisturbed run."""
    make_teacher(folder / "teacher")
    write_oscar(folder / "corpus", parts=1, texts=40)
    database = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    with serving(folder / "server") as server, (folder / "commands.log").open("w", encoding="utf-8") as log:
        variables = environment(folder, server.url) | {"OPENBLAS_NUM_THREADS": "1"}
        del variables[MARK]  # each trial sets its own
        variables["PYTHONPATH"] = f"{REPO / 'tests' / 'hard' / 'crash' / 'hook'}{os.pathsep}{REPO}"
        forker = subprocess.Popen(
            [sys.executable, "-m", "tests.hard.crash.forked_commands"],
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            inputs = Matrix(folder, forker, database)
            inputs._answer()
            _undisturbed(inputs)
            yield inputs
        finally:
            forker.kill()
            forker.communicate()


def _undisturbed(inputs: Matrix) -> None:
    project = inputs.project("undisturbed")
    start = time.monotonic()
    if inputs.run(project, hook_of(project)) != 0:
        raise RuntimeError(f"the undisturbed run failed: {output_of(project)}")
    inputs.seconds = time.monotonic() - start
    inputs.points = (project.folder / "points").read_text(encoding="utf-8").splitlines()
    inputs.files = artifacts(project)
    faults = differences(inputs, project)
    if faults:
        raise RuntimeError(f"the undisturbed run has faults: {faults}")


def hook_of(project: Project, at: str = "", target: str = "") -> dict[str, str]:
    """Returns the environment of a run that records its crash points and is killed at the point `at`."""
    return {points.FOLDER: str(project.folder), points.HOME: str(project.home), points.AT: at, points.TARGET: target}


def output_of(project: Project) -> str:
    """Returns the last 3,000 characters of the output of the project's commands."""
    return (project.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]


# ---- one trial ----------------------------------------------------------------------------------------------


def kill_at_point(inputs: Matrix, number: int, at: str, target: str) -> KillTrial:
    """Kills a new pipeline at a crash point."""

    def first(project: Project) -> bool:
        inputs.run(project, hook_of(project, at, target))
        return at in (project.folder / "points").read_text(encoding="utf-8").splitlines()

    return _trial(inputs, number, at, target, first)


def kill_after(inputs: Matrix, number: int, seconds: float) -> KillTrial:
    """Kills a new pipeline some seconds after its start."""

    def first(project: Project) -> bool:
        def kill(pid: int) -> None:
            time.sleep(seconds)
            family = psutil.Process(pid)
            for process in (family, *family.children(recursive=True)):
                process.send_signal(signal.SIGKILL)

        return inputs.run(project, meanwhile=kill) == -signal.SIGKILL

    return _trial(inputs, number, f"{seconds:.2f} s after the start", "all", first)


def _trial(inputs: Matrix, number: int, at: str, target: str, first: Callable[[Project], bool]) -> KillTrial:
    start = time.monotonic()
    project = inputs.project(f"trial-{number}")
    killed = first(project)
    faults = [f"process left after the kill: {one}" for one in left_behind(project)]
    faults += [f"incomplete artifact counts as finished: {fault.reason}" for fault in verify(project.store)]
    status = inputs.run(project)
    if status:
        faults.append(f"the repeated run ended with status {status}: {output_of(project)[-1000:]}")
    faults += [f"process left after the repeated run: {one}" for one in left_behind(project)]
    faults += differences(inputs, project)
    if not faults:
        shutil.rmtree(project.folder)
    return KillTrial(at, target, killed, time.monotonic() - start, tuple(faults))


def left_behind(project: Project) -> list[str]:
    """Returns the processes that were started for a project and did not end within END_SECONDS."""
    end = time.monotonic() + END_SECONDS
    while (found := started_for(project.folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return [str(process) for process in found]


# ---- what must hold ----------------------------------------------------------------------------------------


def artifacts(project: Project) -> Files:
    """Returns the files and hashes of the comparable artifacts by kind, key and label.

    Only the last checkpoint is compared, since the others depend on when the pipeline was killed, and without its
    run.json, which contains the path of the home. Scores are not compared: they contain paths and times.
    """
    kinds = ("source", "shard", "blocks", "calibration", "targets", "model")
    last = [one for one in project.receipts("checkpoint") if one.settings["step"] == STEPS]
    return {
        (one.kind, one.key, one.label): tuple(file for file in one.files if file.name != "run.json")
        for one in [*project.receipts(*kinds), *last]
    }


def differences(inputs: Matrix, project: Project) -> list[str]:
    """Returns all differences from the undisturbed run."""
    faults = [fault.reason for fault in verify(project.store)]
    if artifacts(project) != inputs.files:
        here = artifacts(project)
        differ = sorted(
            str(one[::2]) for one in here.keys() | inputs.files.keys() if here.get(one) != inputs.files.get(one)
        )
        faults.append(f"artifacts differ from those of the undisturbed run: {differ}")
    # The note names the MLflow of the run; a test that ran earlier in this process may have set a different one.
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with patch.dict(os.environ, elsewhere, clear=True):
        done = all_done(Workspace(project.store, load_recipe(project.recipe)))
    if done is None:
        faults.append("work remains after the repeated run")
    return faults + _wrong_in_mlflow(project)


def _wrong_in_mlflow(project: Project) -> list[str]:
    client = MlflowClient(project.mlflow)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    parts = [run.data.tags["distil.part"] for run in runs]
    faults = [
        f"run {run.data.tags['distil.part']} is {run.info.status}" for run in runs if run.info.status != "FINISHED"
    ]
    if len(set(parts)) != len(parts):
        faults.append(f"MLflow contains a run more than once: {sorted(parts)}")
    chain = next(run for run in runs if run.data.tags["distil.part"] == "chain")
    if "train.max_steps" not in chain.data.params:
        faults.append("the run does not have its settings as parameters")
    train = next(run for run in runs if run.data.tags["distil.part"] == "train")
    steps = [metric.step for metric in client.get_metric_history(train.info.run_id, "loss")]
    if steps != list(range(1, STEPS + 1)):
        faults.append(f"the loss curve has the steps {steps}")
    versions = client.search_model_versions("name = 'distilled'")
    if [str(one.version) for one in versions] != ["1"]:
        faults.append(f"the model has {len(versions)} versions instead of one")
    aliases = client.get_registered_model("distilled").aliases
    if {name: str(number) for name, number in aliases.items()} != {"challenger": "1"}:
        faults.append(f"the model has the aliases {aliases}")
    if any(tag.startswith("distil.half") for one in versions for tag in one.tags):
        faults.append("the model version is incompletely registered")
    return faults


# ---- which points ------------------------------------------------------------------------------------------


def kind_of(point: str) -> str:
    """Returns the kind of a crash point, such as `before replace data/shard`: the operation and the kind of file."""
    when, what, *about = point.rpartition(" #")[0].split(" ")
    return " ".join([when, what, *("/".join(word.split("/")[:3]) for word in about)])


def spread(all_points: Sequence[str], count: int) -> list[str]:
    """Returns `count` crash points, in turn one of each kind.

    Kinds and points are shuffled with a fixed seed, so that a run that runs out of time has covered early and late
    points of the pipeline.
    """
    draw = random.Random(8)
    kinds: dict[str, list[str]] = defaultdict(list)
    for one in all_points:
        kinds[kind_of(one)].append(one)
    for members in kinds.values():
        draw.shuffle(members)
    order = sorted(kinds)
    draw.shuffle(order)
    chosen: list[str] = []
    while len(chosen) < min(count, len(all_points)):
        chosen += [kinds[kind].pop() for kind in order if kinds[kind]]
    return chosen[:count]


def run_trials(
    inputs: Matrix, chosen: Sequence[str], moments: int, seed: int, limit: float = float("inf")
) -> Iterator[KillTrial]:
    """Yields a trial for each chosen crash point, then for `moments` random times, until the time limit in seconds."""
    end = time.monotonic() + limit
    draw = random.Random(seed)
    for number, at in enumerate(chosen):
        if time.monotonic() < end:
            yield kill_at_point(inputs, number, at, ("all", "one")[number % 2])
    for number in range(moments):
        if time.monotonic() < end:
            yield kill_after(inputs, len(chosen) + number, draw.uniform(0.0, inputs.seconds))


def line_of(trial: KillTrial) -> str:
    """Returns one line of the table."""
    end = "recovered" if not trial.faults else "; ".join(trial.faults)
    killed = "killed" if trial.killed else "not reached"
    return f"{trial.at:<90} {trial.target:<4} {killed:<12} {trial.seconds:5.1f} s  {end}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each trial, then the totals. Returns 1 if any trial has faults, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.crash.matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="visit all crash points")
    parser.add_argument(
        "--points", type=int, default=40, help="number of crash points, evenly distributed over all kinds"
    )
    parser.add_argument("--random", type=int, default=0, help="number of kills at random times")
    parser.add_argument("--at", action="append", help="visit this crash point, as printed by --list; repeatable")
    parser.add_argument("--seed", type=int, default=8, help="seed of the random times")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--list", action="store_true", help="only list the crash points")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, matrix(Path(folder)) as inputs:
        kinds = len({kind_of(one) for one in inputs.points})
        points_found = f"{len(inputs.points)} crash points of {kinds} kinds"
        print(f"{points_found}; an undisturbed run takes {inputs.seconds:.1f} s", flush=True)
        if given.list:
            print("\n".join(inputs.points))
            return 0
        chosen = given.at or (inputs.points if given.all else spread(inputs.points, given.points))
        trials = []
        for trial in run_trials(inputs, chosen, given.random, given.seed, given.minutes * 60):
            trials.append(trial)
            print(line_of(trial), flush=True)
    bad = [trial for trial in trials if trial.faults]
    killed = sum(trial.killed for trial in trials)
    record(
        "tests.hard.crash.matrix",
        f"{len(trials)} kills at {len(inputs.points)} crash points and random times: {killed} took effect there, "
        f"{len(trials) - len(bad)} recovered completely",
    )
    print(f"{len(trials)} kills, {killed} at their crash point or time, {len(trials) - len(bad)} recovered completely")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
