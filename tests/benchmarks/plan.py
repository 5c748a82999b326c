"""Accuracy of `distil plan`: runs the plan, then the run it forecasts, and compares both stage by stage.

    python -m tests.benchmarks.plan                                             the demo, from text to scores
    python -m tests.benchmarks.plan deployments/pilot.toml corpus.url=FOLDER ... --prepare      text and targets only

Needs the project installed (`pip install -e .`). Plan and run share an empty home, as for a user. Bytes are those of
the receipts. The real time of a stage lasts from the last receipt of the stage before to its own last one; time before
the first and after the last stage belongs to the first and the last row. Prints a table and writes it, as Markdown and
JSON, into tests/benchmarks/results/, named by date and hardware.

The ratio is forecast / real. The load of the machine is given before the plan, between plan and run, and after the run:
plan and run are measured at different moments, so on a machine with changing load the ratio of seconds means little.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from storage.store import Store
from tasks.plan.forecast import END as END_SECONDS
from tasks.plan.forecast import START as START_SECONDS
from tests.benchmarks.results import REPO, RESULTS, hardware, notes_of, save, today

DEMO = REPO / "deployments" / "demo.toml"
FIRST_ROW = "start and source"
LAST_ROW = "score and end"
STAGES = {FIRST_ROW: "source", "blocks": "blocks", "calibration and targets": "targets", "train": "model"}
"""The kind of artifact whose last receipt ends a stage, by row of the table."""


@dataclass(frozen=True)
class Line:
    """One row: forecast and real bytes or seconds."""

    what: str
    unit: str
    forecast: float
    real: float

    @property
    def ratio(self) -> float:
        """1 for a perfect forecast."""
        return self.forecast / self.real if self.real else float("nan")


def distil(*arguments: str) -> tuple[str, float, float]:
    """Standard output of a command, its start (seconds since 1970) and its duration in seconds."""
    begun, started = time.time(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=REPO, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, begun, time.perf_counter() - started


def real_seconds(store: Store, begun: float, wall: float, *, training: bool) -> dict[str, float]:
    """Seconds by row of the table, from the times of the receipts."""
    found: dict[str, float] = {}
    before = begun
    for row, kind in STAGES.items():
        created = [datetime.datetime.fromisoformat(receipt.created).timestamp() for receipt in store.receipts(kind)]
        if created:
            found[row] = max(created) - before
            before = max(created)
    return found | ({LAST_ROW: begun + wall - before} if training else {})


def forecast_seconds(plan: Mapping[str, Any], *, training: bool) -> dict[str, float]:
    """The same rows from the plan; its "start and end" is divided between the first and the last."""
    total = {stage: amount["total"] for stage, amount in plan["seconds"].items()}
    found = {
        FIRST_ROW: total["source"],
        "blocks": total["blocks"],
        "calibration and targets": total.get("calibration", 0.0) + total.get("targets", 0.0),
        "train": total.get("train", 0.0),
        LAST_ROW: total.get("score", 0.0),
    }
    start_share = START_SECONDS / (START_SECONDS + END_SECONDS) if training else 1.0
    found[FIRST_ROW] += total["start and end"] * start_share
    found[LAST_ROW] += total["start and end"] * (1 - start_share)
    return found


def compare(recipe: str, overrides: Sequence[str], *, training: bool) -> tuple[list[Line], dict[str, str]]:
    """Runs the plan, then the run; returns the rows, and the facts about other load on the machine."""
    loads = [_load()]
    with tempfile.TemporaryDirectory() as home:
        arguments = [recipe, *overrides, f"home={home}"]
        plan = json.loads(distil("plan", *arguments, "--json", *([] if training else ["--prepare"]))[0])
        loads.append(_load())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, begun, wall = distil("run" if training else "prepare", *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        loads.append(_load())
        store = Store(Path(home) / "store")
        lines = [
            Line(kind, "bytes", amount["total"], sum(store.sizes(kind).values()))
            for kind, amount in plan["sizes"]["bytes"].items()
        ]
        seconds = real_seconds(store, begun, wall, training=training)
    lines.append(Line("total", "bytes", sum(one.forecast for one in lines), sum(one.real for one in lines)))
    forecast = forecast_seconds(plan, training=training)
    lines += [Line(row, "seconds", forecast[row], real) for row, real in seconds.items()]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {
        "load before, between and after": ", ".join(loads),
        "CPU seconds of the run, all its processes": f"{used:,.0f} in {wall:,.0f} seconds",
    }
    return [*lines, Line("total", "seconds", plan["total_seconds"]["total"], wall)], facts


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def markdown(lines: Sequence[Line], facts: Mapping[str, str]) -> str:
    """The table with the conditions of the measurement."""
    text = ["# Forecast of `distil plan`", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    text += ["| what | forecast | real | ratio |", "|---|---|---|---|"]
    for line in lines:
        shown = (f"{value:,.0f}" if line.unit == "bytes" else f"{value:,.1f}" for value in (line.forecast, line.real))
        text.append(f"| {line.what}, {line.unit} | {' | '.join(shown)} | {line.ratio:.2f} |")
    return "\n".join([*text, "", notes_of(__doc__), ""])


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "recipe", nargs="*", metavar="RECIPE.toml a.b=c", help="recipe and overrides; the demo by default"
    )
    parser.add_argument("--prepare", action="store_true", help="compare `distil prepare` instead of `distil run`")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_intermixed_args()
    recipe, *overrides = given.recipe or [str(DEMO)]
    recipe = str(Path(recipe).resolve())
    lines, load = compare(recipe, overrides, training=not given.prepare)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "date": today(),
        "hardware": hardware(device),
        "recipe": f"{Path(recipe).name}{', prepared only' if given.prepare else ''}",
        **load,
    }
    text = markdown(lines, facts)
    print(text)
    record = {**facts, "lines": [asdict(line) | {"ratio": line.ratio} for line in lines]}
    save(given.results, f"plan-{Path(recipe).stem}", device, text, record)


if __name__ == "__main__":
    main()
