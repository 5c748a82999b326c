"""The proof: trains a teacher from scratch, students and controls, and scores them, all by `distil` commands.

    python -m tests.benchmarks.proof --corpus FOLDER --tokenizer FOLDER --sets FOLDER --home FOLDER [RUN ...]

Runs are KIND-SEED (`student-0 control-0 all-0`), by default all of RUNS, most valuable first. The recipes are those of
deployments/proof/. Existing artifacts are not computed again, so a command that was stopped can simply be repeated;
`--table` only reads existing results. Before the first student `distil plan` runs, and its forecast is compared with
the real run. Two cores take two hours for teacher, `student-0`, `control-0` and `all-0`. Table and figures are written
into tests/benchmarks/results/, named by date and hardware.

One training is one seed of data order and new weights (`train.seed`), on one cache and from the same start. The
fine-tuned sets are those of deployments/score/small.toml, three seeds each: NER for every model, PAWS-X and XNLI for
the teacher, the first student and the first control, since their few test rows cannot separate models.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.store import Store
from tests.benchmarks.evidence import TEACHER, comparison, differences, gather, scores_figure, table, training_curves
from tests.benchmarks.results import REPO, RESULTS, facts_of, hardware, notes_of, save, today

PROOF = REPO / "deployments" / "proof"
PROTOCOL = REPO / "deployments" / "score" / "small.toml"
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "student": ("student", ()),
    "control": ("control", ()),
    "all": ("all", ()),
    "online": ("online", ()),
    "no-distil": ("student", ("loss.distil=0",)),
    "no-cosine": ("student", ("loss.cosine=0",)),
    "no-mlm": ("student", ("loss.mlm=0",)),
    "scratch": ("scratch", ()),
}
"""Recipe of deployments/proof/ and its overrides, by kind."""
RUNS = (
    *("student-0", "control-0", "all-0", "student-1", "control-1", "online-0", "student-2", "control-2"),
    *("online-1", "online-2", "no-distil-0", "no-cosine-0", "no-mlm-0", "scratch-0"),
)
"""All runs, most valuable first."""


@dataclass(frozen=True)
class Place:
    """Folders of the corpus, the tokenizer, the evaluation sets, and of everything that the proof writes."""

    corpus: Path
    tokenizer: Path
    sets: Path
    home: Path

    def arguments(self, recipe: str, *more: str) -> list[str]:
        """A recipe of the proof and the overrides that depend on this machine."""
        own = [f"blocks.tokenizer={self.tokenizer}"] if recipe == TEACHER else [f"teacher.model={self.model(TEACHER)}"]
        return [str(PROOF / f"{recipe}.toml"), f"corpus.url={self.corpus}", f"home={self.home}", *own, *more]

    def model(self, run: str) -> Path:
        """Folder of a run's model."""
        return self.home / "models" / f"proof-{run}"


def distil(*arguments: str) -> str:
    """Standard output of a command. CalledProcessError if it fails."""
    print("distil", *arguments, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=REPO, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def train(place: Place, run: str) -> None:
    """Trains one kind with one seed; for the first run of all, records forecast and real cost in forecast.json."""
    kind, seed = run.rsplit("-", 1)
    recipe, changes = KINDS[kind]
    arguments = place.arguments(recipe, f"name=proof-{run}", f"train.seed={seed}", *changes)
    forecast = place.home / "forecast.json"
    if forecast.exists():
        distil("run", *arguments)
        return
    plan = json.loads(distil("plan", *arguments, "--json"))
    before = _bytes(place.home)
    started = time.perf_counter()
    distil("run", *arguments)
    wall = time.perf_counter() - started
    planned = {"bytes": sum(amount["left"] for amount in plan["sizes"]["bytes"].values())}
    planned["seconds"] = plan["total_seconds"]["left"]
    real = {"bytes": sum(_bytes(place.home)[kind] - before.get(kind, 0) for kind in plan["sizes"]["bytes"])}
    real["seconds"] = wall
    forecast.write_text(json.dumps({"run": run, "forecast": planned, "real": real, "plan": plan}, indent=1))


def _bytes(home: Path) -> dict[str, int]:
    store = Store(home / "store")
    kinds = ("source", "shard", "blocks", "counts", "calibration", "targets", "checkpoint", "model")
    return {kind: sum(store.sizes(kind).values()) for kind in kinds}


def score(place: Place, runs: Sequence[str]) -> None:
    """Scores every existing run on held-out text and NER, and the first ones on the other sets too."""
    existing = [run for run in runs if place.model(run).is_dir()]
    arguments = [*place.arguments("student"), "--protocol", str(PROTOCOL), f"score.sets={place.sets}"]
    first = [run for run in existing if run in ("student-0", "control-0")]
    distil("score", *(str(place.model(run)) for run in existing), *arguments, "--only", "ner")
    distil("score", *(str(place.model(run)) for run in first), *arguments)


def publish(place: Place, folder: Path) -> None:
    """Prints and writes the table, the figure and the training curves of the existing runs."""
    kinds = {kind: [f"proof-{run}" for run in RUNS if run.rsplit("-", 1)[0] == kind] for kind in KINDS}
    evidence = gather(place.home, {TEACHER: [f"proof-{TEACHER}"], **kinds})
    header, *rows = table(evidence)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    forecast = place.home / "forecast.json"
    found: dict[str, Any] = json.loads(forecast.read_bytes()) if forecast.exists() else {}
    facts = facts_of(command=f"python -m tests.benchmarks.proof {' '.join(_trained(evidence.trainings))}")
    if found:
        ratios = [f"{unit} {found['forecast'][unit] / found['real'][unit]:.2f}" for unit in ("bytes", "seconds")]
        facts["forecast / real of `distil plan`"] = ", ".join(ratios) + f" ({found['run']})"
    text = ["# The proof", "", *(f"- {name}: {value}" for name, value in facts.items()), "", *lines, ""]
    text += [f"- {line}" for line in differences(evidence)]
    text += ["", notes_of(__doc__), ""]
    print("\n".join(text))
    minus_student = {
        kind: comparison(evidence, kind, "student") for kind in evidence.trainings if kind not in ("student", TEACHER)
    }
    record = {
        **facts,
        "rows": [dict(zip(header, row, strict=True)) for row in rows],
        "student / teacher": comparison(evidence, "student", TEACHER),
        "minus student": minus_student,
        "forecast": found,
        "trainings": {kind: [_plain(one) for one in group] for kind, group in evidence.trainings.items()},
    }
    save(folder, "proof", "cpu", "\n".join(text), record)
    stem = f"{today()}-{hardware().lower().replace(' ', '-')}-proof"
    (folder / f"{stem}-scores.png").write_bytes(scores_figure(evidence))
    (folder / f"{stem}-curves.png").write_bytes(training_curves(evidence))


def _trained(trainings: Any) -> list[str]:
    return [one.name.removeprefix("proof-") for group in trainings.values() for one in group if TEACHER not in one.name]


def _plain(one: Any) -> dict[str, Any]:
    """A training as plain values, without metrics and per-block results."""
    heldout = {name: value for name, value in one.heldout.items() if name != "by_block"}
    tuned = {
        part: [{name: run[name] for name in ("accuracy", "macro_f1", "entity_f1") if name in run} for run in runs]
        for part, runs in one.tuned.items()
    }
    found = asdict(one) | {"heldout": heldout, "tuned": tuned, "folder": one.folder.name}
    return {name: value for name, value in found.items() if name != "metrics"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains missing runs, scores them and writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.proof", description=(__doc__ or "").split("\n")[0]
    )
    for name, about in (("corpus", "sources"), ("tokenizer", "its tokenizer"), ("sets", "the protocol's sets")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of {about}")
    parser.add_argument(
        "--home", type=Path, default=REPO / ".distil" / "proof", help="folder for everything that the proof writes"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--table", action="store_true", help="only write the table of existing results")
    parser.add_argument("runs", nargs="*", metavar="KIND-SEED", help=f"one of {', '.join(RUNS)}")
    given = parser.parse_intermixed_args(arguments)
    runs = given.runs or RUNS
    if unknown := sorted(set(runs) - set(RUNS)):
        parser.error(f"no such run: {', '.join(unknown)}; choose from {', '.join(RUNS)}")
    place = Place(*(path.resolve() for path in (given.corpus, given.tokenizer, given.sets, given.home)))
    if not given.table:
        distil("run", *place.arguments(TEACHER))
        for run in runs:
            train(place, run)
        score(place, runs)
    publish(place, given.results)


if __name__ == "__main__":
    main()
