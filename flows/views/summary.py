"""Makes the rows of a run's final table: artifacts, scores, gate decision, locations and times.

sections = summary_sections(summary, seconds)       # heading -> rows of (name, text)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flows.views.comparison import (
    METRIC_LABELS,
    METRIC_ROWS,
    agreement,
    counted,
    not_run_parts,
    ratio_text,
    spread_text,
)
from flows.views.links import MADE, MODEL, WHERE, location_rows
from flows.views.tables import Rows, number, seconds, size
from tasks.eval.scores import was_run
from tasks.lineage import Workspace
from tasks.recipe.run_json import METRICS, RunSpec
from tasks.train.metrics import read_metrics

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class RunSummary:
    """The data of the final table."""

    workspace: Workspace
    run: RunSpec
    model_folder: Path
    mlflow_model: str
    mlflow_uri: str
    mlflow_run: str
    mlflow_url: str
    scores: Mapping[str, Scores]
    stage_seconds: Mapping[str, float]
    gate: Rows
    command: str = ""


def summary_sections(summary: RunSummary, total: float) -> dict[str, Rows]:
    """Returns all rows by heading. `total` is the wall time of the run in seconds."""
    return {
        MADE: _made(summary),
        "Scores": score_rows(summary.scores),
        "Fill-mask": fill_mask_rows(summary.scores.get("fill-mask", {})),
        "Gate": summary.gate,
        WHERE: location_rows(summary.workspace.recipe, summary.model_folder, summary.mlflow_uri, summary.command),
        "Time": [(name, seconds(value)) for name, value in summary.stage_seconds.items()] + [("total", seconds(total))],
    }


def _made(summary: RunSummary) -> Rows:
    store, lineage, run = summary.workspace.store, summary.workspace.lineage, summary.run
    model = store.receipt(run.model_ref)
    lines = [line for line in read_metrics(Path(run.folder) / METRICS) if "tokens_per_second" in line]
    shards = store.receipts_of(lineage.shards)
    targets = store.receipts_of(target.ref for target in lineage.targets)
    speed = f", {number(median(line['tokens_per_second'] for line in lines))} tokens/s" if lines else ""
    rows = [
        ("snapshot", f"{lineage.snapshot.url} ({lineage.snapshot.fingerprint[:12]})"),
        ("sources", number(len(lineage.sources))),
        ("shards", f"{number(len(shards))} and {number(len(lineage.heldout_shards))} held out, {size_of(shards)}"),
        ("documents", number(sum(receipt.rows for receipt in shards))),
        ("blocks", f"{number(run.rows)} of {run.blocks.length} tokens"),
        ("tokens", number(sum(part.tokens for part in run.manifest))),
        ("training", f"{number(run.total_steps)} steps, {number(model.tokens)} tokens{speed}"),
        (MODEL, str(summary.model_folder)),
        ("MLflow run", summary.mlflow_url or summary.mlflow_run),
        ("MLflow model", summary.mlflow_model),
    ]
    if targets:
        rows.insert(
            6, ("targets", f"{size_of(targets)}, {summary.workspace.recipe.targets.encoding}, {run.targets.positions}")
        )
    return rows


def size_of(receipts: Any) -> str:
    """Returns the total size of several artifacts as text."""
    return size(sum(receipt.size for receipt in receipts))


def score_rows(scores: Mapping[str, Scores]) -> Rows:
    """Returns one row per main metric, followed by the scores that were not run, with their reasons."""
    rows: list[tuple[str, str]] = []
    for part, figures in scores.items():
        if part in _ROWS_OF and was_run(figures):
            rows += _ROWS_OF[part](figures)
        elif "metric" in figures:
            rows += _rows_of_set(part, figures)
    rows += [(", ".join(parts), f"not run: {reason}") for reason, parts in not_run_parts(scores)]
    return rows


def _heldout_rows(figures: Scores) -> Rows:
    rows = [
        (
            "masked top-1",
            _against(figures, "top1", 100, " %")
            + f", most-frequent-token baseline {100 * figures['frequent_top1']:.1f} %",
        ),
        ("perplexity", _against(figures, "perplexity", 1, "")),
    ]
    if "kept" in figures:
        rows.append(
            (
                "share of the teacher above the baseline",
                f"{figures['kept']:.3f} = (student - baseline) / (teacher - baseline)",
            )
        )
    if "kl" in figures:
        rows.append(("vs. teacher", f"KL {figures['kl']:.3f} nats, top-1 agreement {100 * figures['agreement']:.1f} %"))
    return rows


def _against(figures: Scores, name: str, factor: float, unit: str) -> str:
    own = f"{factor * figures[name]:.1f}{unit}"
    teacher = f"teacher_{name}"
    return f"{own} (teacher {factor * figures[teacher]:.1f}{unit})" if teacher in figures else own


def _size_and_speed_rows(figures: Scores) -> Rows:
    def listed(values: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    rows = [
        ("parameters", listed({name: number(both["with_head"]) for name, both in figures["parameters"].items()})),
        ("weights", listed({name: size(value) for name, value in figures["bytes"].items()})),
    ]
    latency = figures["latency"]
    if not was_run(latency):
        return [*rows, ("latency", f"not run: {latency['reason']}")]
    times = {
        name: ", ".join(f"{ms:.1f} ms (batch {size})" for size, ms in by.items()) for name, by in latency["ms"].items()
    }
    return [*rows, (f"CPU, {latency['tokens']} tokens", listed(times))]


def _rows_of_set(part: str, figures: Scores) -> Rows:
    """Returns the rows of a fine-tuned data set: metrics over seeds, ratio to the teacher, and numbers of rows."""
    paths = METRIC_ROWS[figures["metric"]]
    seeds = len(figures["runs"])
    rows = []
    for path in paths:
        value = figures["summary"]
        for name in path:
            value = value[name]
        rows.append((f"{part} {METRIC_LABELS.get(path, path[-1])}", f"{spread_text(value)} % (seeds: {seeds})"))
    if ratio := ratio_text(figures):
        rows.append((f"{part} / teacher", ratio))
    return [*rows, (f"{part} rows", counted(figures["counts"]))]


_ROWS_OF = {"heldout": _heldout_rows, "size-and-speed": _size_and_speed_rows}


def fill_mask_rows(figures: Scores) -> Rows:
    """Returns a row per sentence with each model's most likely tokens, and how often student and teacher agree."""
    rows = [
        (row["sentence"], "\n".join(_answers(name, answers) for name, answers in row["answers"].items()))
        for row in figures.get("rows", ())
    ]
    names = list(figures["rows"][0]["answers"]) if rows else []
    if len(names) == 2:
        rows.append(("top-1 agreement", agreement(figures, *names)))
    return rows


def _answers(name: str, answers: Any) -> str:
    return f"{name}: " + ", ".join(f"{answer['token']} {100 * answer['probability']:.0f} %" for answer in answers)
