"""Kills a tiny chain at one of its points, runs it again to its end, and compares the result with an undisturbed run.

    python -m tests.hard.crash --all --random 30         every point, and 30 random moments
    python -m tests.hard.crash --points 40               a spread over all kinds of points
    python -m tests.hard.crash --list, then --at "POINT"

An undisturbed run gives the list of points and the artifacts to compare with. Each life has a home of its own; corpus,
teacher and Prefect server are shared. Every second point ends only the process that got there, the others the whole
chain. After the death: no process is left and nothing half made counts as done. After the re-run: `verify` is clean,
the artifacts are those of the undisturbed run, nothing is left to do, MLflow shows one result, once.
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

import psutil
from mlflow.tracking import MlflowClient

from flows.pipeline.already_done import all_done
from storage.artifact import DataFile
from storage.verify import verify
from tasks.lineage import Workspace
from tasks.recipe.load import load_recipe
from tests.hard import points
from tests.hard.reliability import record
from tests.harness.place import REPO, Place, environment, make_place
from tests.harness.processes import MARK, started_for
from tests.harness.server import serving
from tests.harness.tiny import make_teacher, write_oscar

STEPS = 8
END_SECONDS = 120.0
"""In which whatever a dead chain leaves behind must have noticed it."""
Files = Mapping[tuple[str, str, str], tuple[DataFile, ...]]


@dataclass(frozen=True)
class Life:
    """One kill: where it was to be (a point, or seconds after the start), and all that was wrong afterwards."""

    at: str
    whom: str
    struck: bool
    seconds: float
    faults: tuple[str, ...]


@dataclass
class Matrix:
    """Everything that the lives share."""

    folder: Path
    nursery: "subprocess.Popen[str]"
    database: Path
    points: list[str] = field(default_factory=list)
    files: Files = field(default_factory=dict)
    seconds: float = 0.0

    def place(self, name: str) -> Place:
        """A home with nothing but an empty database of MLflow, which takes seconds to make."""
        place = make_place(
            self.folder / name,
            self.folder / "corpus",
            self.folder / "teacher",
            train={"max_steps": STEPS, "validate_steps": 4},
            run={"workers": 1, "retry_seconds": 0},
        )
        (place.home / "mlflow").mkdir(parents=True)
        shutil.copy(self.database, place.home / "mlflow" / "mlflow.db")
        return place

    def run(
        self, place: Place, hook: Mapping[str, str] | None = None, meanwhile: Callable[[int], object] | None = None
    ) -> int:
        """`distil run` to whatever end; its status. `meanwhile` gets the process id of the flow."""
        variables = {MARK: str(place.folder), **(hook or {})}
        asked = {"arguments": ["run", str(place.recipe)], "folder": str(place.folder), "variables": variables}
        assert self.nursery.stdin
        print(json.dumps(asked), file=self.nursery.stdin, flush=True)
        pid = self._answer()["pid"]
        if meanwhile:
            meanwhile(pid)
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, Any]:
        assert self.nursery.stdout
        line = self.nursery.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery ended: {(self.folder / 'nursery.log').read_text(encoding='utf-8')}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def matrix(folder: Path) -> Iterator[Matrix]:
    """Teacher, corpus, server and nursery, after one undisturbed run."""
    make_teacher(folder / "teacher")
    write_oscar(folder / "corpus", parts=1, texts=40)
    database = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    with serving(folder / "server") as server, (folder / "nursery.log").open("w", encoding="utf-8") as log:
        variables = environment(folder, server.url) | {"OPENBLAS_NUM_THREADS": "1"}
        del variables[MARK]  # each life has one of its own
        variables["PYTHONPATH"] = f"{REPO / 'tests' / 'hard' / 'hook'}{os.pathsep}{REPO}"
        nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.hard.nursery"],
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            made = Matrix(folder, nursery, database)
            made._answer()
            _undisturbed(made)
            yield made
        finally:
            nursery.kill()
            nursery.communicate()


def _undisturbed(made: Matrix) -> None:
    place = made.place("undisturbed")
    start = time.monotonic()
    if made.run(place, hook_of(place)) != 0:
        raise RuntimeError(f"the undisturbed run failed: {said(place)}")
    made.seconds = time.monotonic() - start
    made.points = (place.folder / "points").read_text(encoding="utf-8").splitlines()
    made.files = artifacts(place)
    faults = found_wrong(made, place)
    if faults:
        raise RuntimeError(f"the undisturbed run is not as it should be: {faults}")


def hook_of(place: Place, at: str = "", whom: str = "") -> dict[str, str]:
    """The environment of a life that counts its points, and dies at one."""
    return {points.FOLDER: str(place.folder), points.HOME: str(place.home), points.AT: at, points.WHOM: whom}


def said(place: Place) -> str:
    """The end of what its commands said."""
    return (place.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]


# ---- one life ----------------------------------------------------------------------------------------------


def live(made: Matrix, number: int, at: str, whom: str) -> Life:
    """Kills a new chain at a point."""

    def first(place: Place) -> bool:
        made.run(place, hook_of(place, at, whom))
        return at in (place.folder / "points").read_text(encoding="utf-8").splitlines()

    return _life(made, number, at, whom, first)


def live_until(made: Matrix, number: int, seconds: float) -> Life:
    """Kills a new chain some seconds after its start."""

    def first(place: Place) -> bool:
        def kill(pid: int) -> None:
            time.sleep(seconds)
            family = psutil.Process(pid)
            for process in (family, *family.children(recursive=True)):
                process.send_signal(signal.SIGKILL)

        return made.run(place, meanwhile=kill) == -signal.SIGKILL

    return _life(made, number, f"{seconds:.2f} s after the start", "all", first)


def _life(made: Matrix, number: int, at: str, whom: str, first: Callable[[Place], bool]) -> Life:
    start = time.monotonic()
    place = made.place(f"life-{number}")
    struck = first(place)
    faults = [f"left behind: {one}" for one in left_behind(place)]
    faults += [f"half made and counted as done: {fault.reason}" for fault in verify(place.store)]
    status = made.run(place)
    if status:
        faults.append(f"the run after it ended with {status}: {said(place)[-1000:]}")
    faults += [f"left behind at the end: {one}" for one in left_behind(place)]
    faults += found_wrong(made, place)
    if not faults:
        shutil.rmtree(place.folder)
    return Life(at, whom, struck, time.monotonic() - start, tuple(faults))


def left_behind(place: Place) -> list[str]:
    """Processes that were started for a place and do not end by themselves soon after its flow."""
    end = time.monotonic() + END_SECONDS
    while (found := started_for(place.folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return [str(process) for process in found]


# ---- what must hold ----------------------------------------------------------------------------------------


def artifacts(place: Place) -> Files:
    """Files with their hashes by kind, key and label. Of checkpoints the last one: which others are there depends on
    when the chain received its signal; its run.json names the home. Scores hold paths and times."""
    kinds = ("source", "shard", "blocks", "calibration", "targets", "model")
    last = [one for one in place.receipts("checkpoint") if one.settings["step"] == STEPS]
    return {
        (one.kind, one.key, one.label): tuple(file for file in one.files if file.name != "run.json")
        for one in [*place.receipts(*kinds), *last]
    }


def found_wrong(made: Matrix, place: Place) -> list[str]:
    """All that is not as in a place where nothing happened."""
    faults = [fault.reason for fault in verify(place.store)]
    if artifacts(place) != made.files:
        here = artifacts(place)
        differ = sorted(
            str(one[::2]) for one in here.keys() | made.files.keys() if here.get(one) != made.files.get(one)
        )
        faults.append(f"not the artifacts of an undisturbed run: {differ}")
    if all_done(Workspace(place.store, load_recipe(place.recipe))) is None:
        faults.append("something is left to do")
    return faults + _wrong_in_mlflow(place)


def _wrong_in_mlflow(place: Place) -> list[str]:
    client = MlflowClient(place.mlflow)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    parts = [run.data.tags["distil.part"] for run in runs]
    faults = [
        f"run {run.data.tags['distil.part']} is {run.info.status}" for run in runs if run.info.status != "FINISHED"
    ]
    if len(set(parts)) != len(parts):
        faults.append(f"runs more than once: {sorted(parts)}")
    chain = next(run for run in runs if run.data.tags["distil.part"] == "chain")
    if "train.max_steps" not in chain.data.params:
        faults.append("the run has not its settings")
    train = next(run for run in runs if run.data.tags["distil.part"] == "train")
    steps = [metric.step for metric in client.get_metric_history(train.info.run_id, "loss")]
    if steps != list(range(1, STEPS + 1)):
        faults.append(f"the curve has the steps {steps}")
    versions = client.search_model_versions("name = 'distilled'")
    if [str(one.version) for one in versions] != ["1"]:
        faults.append(f"{len(versions)} versions of one result")
    aliases = client.get_registered_model("distilled").aliases
    if {name: str(number) for name, number in aliases.items()} != {"challenger": "1"}:
        faults.append(f"aliases {aliases}")
    if any(tag.startswith("distil.half") for one in versions for tag in one.tags):
        faults.append("the version is half registered")
    return faults


# ---- which points ------------------------------------------------------------------------------------------


def kind_of(point: str) -> str:
    """Points of one kind: the same thing done to the same sort of file. `before replace data/shard`"""
    when, what, *about = point.rpartition(" #")[0].split(" ")
    return " ".join([when, what, *("/".join(word.split("/")[:3]) for word in about)])


def spread(all_points: Sequence[str], count: int) -> list[str]:
    """`count` points: in turn one of each kind, kinds and points in a mixed order that is always the same, so that a
    visit that runs out of time has been early and late in the chain."""
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


def visit(made: Matrix, chosen: Sequence[str], moments: int, seed: int, limit: float = float("inf")) -> Iterator[Life]:
    """All chosen points, then random moments, as long as there is time."""
    end = time.monotonic() + limit
    draw = random.Random(seed)
    for number, at in enumerate(chosen):
        if time.monotonic() < end:
            yield live(made, number, at, ("all", "one")[number % 2])
    for number in range(moments):
        if time.monotonic() < end:
            yield live_until(made, len(chosen) + number, draw.uniform(0.0, made.seconds))


def line_of(life: Life) -> str:
    """A line of the table."""
    end = "survived" if not life.faults else "; ".join(life.faults)
    return f"{life.at:<90} {life.whom:<4} {'killed' if life.struck else 'not reached':<12} {life.seconds:5.1f} s  {end}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each life, then the figures; 1 if anything showed."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.crash", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every point")
    parser.add_argument("--points", type=int, default=40, help="number of points, spread over all kinds")
    parser.add_argument("--random", type=int, default=0, help="number of random moments")
    parser.add_argument("--at", action="append", help="these points, as the table names them")
    parser.add_argument("--seed", type=int, default=8, help="of the random moments")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--list", action="store_true", help="only list the points")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, matrix(Path(folder)) as made:
        kinds = len({kind_of(one) for one in made.points})
        print(f"{len(made.points)} points of {kinds} kinds; an undisturbed run takes {made.seconds:.1f} s", flush=True)
        if given.list:
            print("\n".join(made.points))
            return 0
        chosen = given.at or (made.points if given.all else spread(made.points, given.points))
        lives = []
        for life in visit(made, chosen, given.random, given.seed, given.minutes * 60):
            lives.append(life)
            print(line_of(life), flush=True)
    bad = [life for life in lives if life.faults]
    struck = sum(life.struck for life in lives)
    record(
        "tests.hard.crash",
        f"{len(lives)} of {len(made.points)} points and random moments: {struck} killed there, "
        f"{len(lives) - len(bad)} without a trace",
    )
    print(f"{len(lives)} lives, {struck} killed at their point or moment, {len(lives) - len(bad)} without a trace")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
