"""The final table of a run: what was made, how good it is, where to look, how long it took.

sheet = sections(store, course, seconds)       # heading -> rows of (name, text); report.py prints it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flows.launch import METRICS
from flows.report import Rows, number, seconds, size
from storage.store import Store
from tasks.config import Recipe
from tasks.lineage import Lineage
from tasks.metrics import read_metrics
from tasks.run import RunSpec

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Course:
    """Everything that the table tells of."""

    recipe: Recipe
    lineage: Lineage
    run: RunSpec
    model_folder: Path
    mlflow_model: str
    mlflow_uri: str
    mlflow_run: str
    mlflow_url: str
    scores: Mapping[str, Scores]
    stage_seconds: Mapping[str, float]


def sections(store: Store, course: Course, total: float) -> dict[str, Rows]:
    """All rows by heading; `total` is the wall time of the run in seconds."""
    return {
        "Made": _made(store, course),
        "Scores": score_rows(course.scores),
        "Fill-mask": fill_mask_rows(course.scores.get("fill-mask", {})),
        "Where to look": _places(course),
        "Time": [(name, seconds(value)) for name, value in course.stage_seconds.items()] + [("total", seconds(total))],
    }


def _made(store: Store, course: Course) -> Rows:
    lineage, run = course.lineage, course.run
    model = store.receipt(run.model_ref)
    lines = [line for line in read_metrics(Path(run.folder) / METRICS) if "tokens_per_second" in line]
    shards = [store.receipt(ref) for ref in lineage.shards if store.has(ref)]
    targets = [store.receipt(target.ref) for target in lineage.targets if store.has(target.ref)]
    speed = f", {number(median(line['tokens_per_second'] for line in lines))} tokens/s" if lines else ""
    rows = [
        ("snapshot", f"{lineage.snapshot.url} ({lineage.snapshot.fingerprint[:12]})"),
        ("sources", number(len(lineage.sources))),
        ("shards", f"{number(len(shards))} and {number(len(lineage.heldout_shards))} held out, {size_of(shards)}"),
        ("documents", number(sum(receipt.rows for receipt in shards))),
        ("blocks", f"{number(run.rows)} of {run.blocks.length} tokens"),
        ("tokens", number(sum(part.tokens for part in run.manifest))),
        ("training", f"{number(run.total_steps)} steps, {number(model.tokens)} tokens{speed}"),
        ("model", str(course.model_folder)),
        ("MLflow run", course.mlflow_url or course.mlflow_run),
        ("MLflow model", course.mlflow_model),
    ]
    if targets:
        rows.insert(6, ("targets", f"{size_of(targets)}, {course.recipe.targets.encoding}, {run.targets.positions}"))
    return rows


def size_of(receipts: Any) -> str:
    """Bytes of several artifacts for people."""
    return size(sum(receipt.size for receipt in receipts))


def score_rows(scores: Mapping[str, Scores]) -> Rows:
    """One row a figure worth a look; a set that was not run says so."""
    rows: list[tuple[str, str]] = []
    for part, figures in scores.items():
        if figures.get("status") == "not run":
            rows.append((part, f"not run: {figures['reason']}"))
        else:
            rows += _WRITERS.get(part, _nothing)(figures)
    return rows


def _nothing(_: Scores) -> Rows:
    return []


def _heldout_rows(figures: Scores) -> Rows:
    rows = [
        (
            "masked top-1",
            _against(figures, "top1", 100, " %") + f", most frequent {100 * figures['frequent_top1']:.1f} %",
        ),
        ("perplexity", _against(figures, "perplexity", 1, "")),
    ]
    if "kept" in figures:
        rows.append(("kept", f"{figures['kept']:.3f} = (student - f) / (teacher - f), f the most frequent token"))
    if "kl" in figures:
        rows.append(("teacher", f"KL {figures['kl']:.3f} nats, same first token {100 * figures['agreement']:.1f} %"))
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
    if latency.get("status") == "not run":
        return [*rows, ("latency", f"not run: {latency['reason']}")]
    times = {
        name: ", ".join(f"{ms:.1f} ms (batch {size})" for size, ms in by.items()) for name, by in latency["ms"].items()
    }
    return [*rows, (f"CPU, {latency['tokens']} tokens", listed(times))]


def _ner_rows(figures: Scores) -> Rows:
    summary, counts = figures["summary"], figures["counts"]
    named = {
        "NER entity F1": summary["entity"]["f1"],
        "NER sub-word F1, weighted, O included": summary["subword"]["weighted_f1"],
    }
    rows = [(name, _over_seeds(value)) for name, value in named.items()]
    train, test = counts["train"], counts["test"]
    left_out = sum(split["rows"] - split["kept"] for split in (train, test))
    kept = f"train {number(train['kept'])}, test {number(test['kept'])}, duplicates left out {number(left_out)}"
    return [*rows, ("NER sentences", kept)]


def _over_seeds(value: Mapping[str, float]) -> str:
    spread = f" ± {100 * value['sd']:.2f}" if "sd" in value else ""
    return f"{100 * value['mean']:.2f}{spread} % (seeds: {int(value['seeds'])})"


_WRITERS = {"heldout": _heldout_rows, "size-and-speed": _size_and_speed_rows, "ner": _ner_rows}


def fill_mask_rows(figures: Scores) -> Rows:
    """Each sentence with the first tokens of student and teacher."""
    return [
        (row["sentence"], "\n".join(_answers(name, answers) for name, answers in row["answers"].items()))
        for row in figures.get("rows", ())
    ]


def _answers(name: str, answers: Any) -> str:
    return f"{name}: " + ", ".join(f"{answer['token']} {100 * answer['probability']:.0f} %" for answer in answers[:3])


def _places(course: Course) -> Rows:
    home = Path(course.recipe.home)
    mlflow = course.mlflow_uri if "://" in course.mlflow_uri else ""
    see = f"mlflow ui --backend-store-uri {mlflow}" if mlflow.startswith("sqlite") else mlflow
    return [
        ("store", course.recipe.store),
        ("curves and models", see),
        ("runs", f"PREFECT_HOME={home / 'prefect'} prefect server start"),
        ("the model", f"pipeline('fill-mask', model='{course.model_folder}')"),
        ("what is there", "distil status RECIPE.toml"),
    ]
