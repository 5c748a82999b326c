"""How well `distil plan` foretells: the plan, then the run it is about, and the ratio of the two stage by stage.

    python tests/benchmarks/plan.py                                             the demo, its whole chain
    python tests/benchmarks/plan.py deployments/pilot.toml corpus.url=FOLDER ... --prepare      text and targets only

Needs the project installed (`pip install -e .`). Both run in an empty home of their own, one after the other, as a user
runs them. Bytes are those of the receipts. The real time of a stage is from the last receipt of the stage before to its
own last one; what comes before the first and after the last is in the first and the last row. Prints a table and
writes it, as Markdown and JSON, into tests/benchmarks/results/ under date and hardware.

The ratio is forecast / real. The load of the machine before the plan, between the two and after the run is told: on a
machine that others use meanwhile, a forecast of seconds says nothing, since both are measured at different moments.
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

from storage.store import Store
from tasks.plan.forecast import END as AFTER
from tasks.plan.forecast import START as BEFORE

REPO = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
DEMO = REPO / "deployments" / "demo.toml"
BEGINNING = "start and source"
END = "score and end"
STAGES = {BEGINNING: "source", "blocks": "blocks", "calibration and targets": "targets", "train": "model"}
"""Row of the table, and the kind whose last receipt ends it."""


@dataclass(frozen=True)
class Line:
    """One row: what is compared, bytes or seconds of both."""

    what: str
    unit: str
    forecast: float
    real: float

    @property
    def ratio(self) -> float:
        """1 for a perfect forecast."""
        return self.forecast / self.real if self.real else float("nan")


def distil(*words: str) -> tuple[str, float, float]:
    """Standard output of a command, when it began (seconds since 1970) and how long it took."""
    begun, started = time.time(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words], cwd=REPO, stdout=subprocess.PIPE, text=True, check=True
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
    return found | ({END: begun + wall - before} if training else {})


def foretold_seconds(plan: Mapping[str, Any], *, training: bool) -> dict[str, float]:
    """The same rows from the plan; its start and end are shared by the first and the last."""
    total = {stage: amount["total"] for stage, amount in plan["seconds"].items()}
    found = {
        BEGINNING: total["source"],
        "blocks": total["blocks"],
        "calibration and targets": total.get("calibration", 0.0) + total.get("targets", 0.0),
        "train": total.get("train", 0.0),
        END: total.get("score", 0.0),
    }
    begins = BEFORE / (BEFORE + AFTER) if training else 1.0
    found[BEGINNING] += total["start and end"] * begins
    found[END] += total["start and end"] * (1 - begins)
    return found


def compare(recipe: str, overrides: Sequence[str], *, training: bool) -> tuple[list[Line], dict[str, str]]:
    """Plan, then run; the rows, and what others may have had to do with it."""
    loads = [_load()]
    with tempfile.TemporaryDirectory() as home:
        words = [recipe, *overrides, f"home={home}"]
        plan = json.loads(distil("plan", *words, "--json", *([] if training else ["--prepare"]))[0])
        loads.append(_load())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, begun, wall = distil("run" if training else "prepare", *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        loads.append(_load())
        store = Store(Path(home) / "store")
        lines = [
            Line(kind, "bytes", amount["total"], sum(store.sizes(kind).values()))
            for kind, amount in plan["sizes"]["bytes"].items()
        ]
        seconds = real_seconds(store, begun, wall, training=training)
    lines.append(Line("together", "bytes", sum(one.forecast for one in lines), sum(one.real for one in lines)))
    foretold = foretold_seconds(plan, training=training)
    lines += [Line(row, "seconds", foretold[row], real) for row, real in seconds.items()]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {
        "load before, between and after": ", ".join(loads),
        "CPU seconds of the run, all its processes": f"{used:,.0f} in {wall:,.0f} seconds",
    }
    return [*lines, Line("together", "seconds", plan["total_seconds"]["total"], wall)], facts


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def hardware() -> str:
    """Short name of the machine for the table and its file name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace("NVIDIA ", "")
    cores = len(os.sched_getaffinity(0))
    return f"CPU {cores} core{'s' if cores > 1 else ''}"


def markdown(lines: Sequence[Line], facts: Mapping[str, str]) -> str:
    """The table and what it was measured on."""
    text = ["# What `distil plan` foretells", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    text += ["| what | forecast | real | ratio |", "|---|---|---|---|"]
    for line in lines:
        shown = (f"{value:,.0f}" if line.unit == "bytes" else f"{value:,.1f}" for value in (line.forecast, line.real))
        text.append(f"| {line.what}, {line.unit} | {' | '.join(shown)} | {line.ratio:.2f} |")
    return "\n".join([*text, "", (__doc__ or "").split("\n\n")[-1].strip(), ""])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE.toml a.b=c", help="recipe and settings; the demo if left out"
    )
    parser.add_argument("--prepare", action="store_true", help="compare `distil prepare`, not the whole chain")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_intermixed_args()
    recipe, *overrides = given.words or [str(DEMO)]
    recipe = str(Path(recipe).resolve())
    lines, others = compare(recipe, overrides, training=not given.prepare)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = {
        "date": date,
        "hardware": hardware(),
        "recipe": f"{Path(recipe).name}{', prepared only' if given.prepare else ''}",
        **others,
    }
    text = markdown(lines, facts)
    print(text)
    given.results.mkdir(parents=True, exist_ok=True)
    name = f"{date}-{hardware().lower().replace(' ', '-')}-plan-{Path(recipe).stem}"
    (given.results / f"{name}.md").write_text(text, encoding="utf-8")
    record = {**facts, "lines": [asdict(line) | {"ratio": line.ratio} for line in lines]}
    (given.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
