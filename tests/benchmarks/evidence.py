"""Results of the proof's runs as table, figure and training curves: means over training seeds, with intervals.

    evidence = gather(home, kinds)              # kinds: {"student": ("proof-student-0", ...), ...}
    table(evidence), scores_figure(evidence), training_curves(evidence)

Reads the store, the runs' metrics and the saved models; computes only intervals and the time of a forward. A value with
± is the mean over training seeds (of each, the mean over fine-tuning seeds) and half of its 95 % interval by Student's
t. For a single training the interval comes from the standard error over blocks on held-out text, and from the
fine-tuning seeds on a fine-tuned set. Differences and ratios are paired by held-out block or test row; their interval
is the wider of a bootstrap over those and t over seeds (tasks.eval.intervals.paired_difference).
"""

import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from storage.artifact import Receipt
from storage.store import Store
from tasks.eval.heldout import block_counts
from tasks.eval.intervals import Z_95, Array, over_seeds, paired_difference
from tasks.eval.loaded_model import load_model
from tasks.eval.metrics import row_counts
from tasks.eval.scores import Scores, read_scores, teacher_figures
from tasks.eval.size_and_speed import latency, parameter_counts, size_on_disk
from tasks.models.model_files import model_content_key
from tasks.recipe.run_json import METRICS as METRICS_FILE
from tasks.release.figure import COLOURS, render_figure
from tasks.release.results import METRICS, ModelSummary, SetResult
from tasks.train.metrics import read_metrics

TUNED = ("ner", "paws-x", "xnli")
TEACHER = "teacher"
PLOT_ORDER = ("student", TEACHER, "control", "all", "scratch", "online", "no-distil", "no-cosine", "no-mlm")
"""Kinds in the order of their colours, the first three as in the figure of the scores. Once the colours are used up,
lines are dashed: `online`, which should equal `student`, stays visible on top of it."""


@dataclass(frozen=True)
class Training:
    """One training: its metrics, the tokens and seconds of its steps, its scores by set and, fine-tuned, by seed."""

    name: str
    folder: Path
    metrics: Sequence[Mapping[str, Any]]
    tokens: int
    seconds: float
    heldout: Scores
    tuned: Mapping[str, tuple[Scores, ...]]


@dataclass(frozen=True)
class Evidence:
    """Trainings by kind; `speed` has "parameters", "bytes" and "latency" of one model of each kind."""

    trainings: Mapping[str, tuple[Training, ...]]
    speed: Mapping[str, Any]


def gather(home: Path, kinds: Mapping[str, Sequence[str]]) -> Evidence:
    """Every existing training of these names; a kind without any is left out."""
    runs = {json.loads(path.read_bytes())["name"]: path.parent for path in home.glob("run/*/run.json")}
    store = Store(home / "store")
    scores = _all_scores(store)
    found = {
        kind: tuple(_training(home, name, runs[name], scores) for name in names if (home / "models" / name).is_dir())
        for kind, names in kinds.items()
    }
    trainings = {kind: existing for kind, existing in found.items() if existing}
    if TEACHER in trainings:  # scored on its students' held-out text, not on that of its own corpus
        own = next(
            (teacher_figures(one.heldout) for group in trainings.values() for one in group if "kl" in one.heldout), {}
        )
        trainings[TEACHER] = tuple(replace(one, heldout=own) for one in trainings[TEACHER])
        # Sets without scores of the teacher are left out: a scoring may have been stopped before it.
        parts = {part for one in trainings[TEACHER] for part in one.tuned}
        trainings = {kind: tuple(_with_sets(one, parts) for one in group) for kind, group in trainings.items()}
    return Evidence(trainings, _speed({kind: group[0].folder for kind, group in trainings.items()}))


def _all_scores(store: Store) -> dict[str, list[tuple[str, int, Scores]]]:
    """Set, seed and figures of every score by model, oldest first.

    For held-out text only those of the most frequent protocol, since a champion is also scored on later snapshots.
    """
    receipts = sorted(store.receipts("scores"), key=lambda receipt: receipt.created)
    protocols = Counter(_protocol(one) for one in receipts if one.settings["set"] == "heldout")
    most_frequent = max(protocols, key=protocols.__getitem__, default="")
    found: dict[str, list[tuple[str, int, Scores]]] = {}
    for receipt in receipts:
        part = receipt.settings["set"]
        if part != "heldout" or _protocol(receipt) == most_frequent:
            figures = read_scores(store, receipt.ref)
            found.setdefault(receipt.parents[0], []).append((part, receipt.settings["seed"], figures))
    return found


def _protocol(receipt: Receipt) -> str:
    return json.dumps(receipt.settings["protocol"], sort_keys=True)


def _training(home: Path, name: str, run: Path, scores: Mapping[str, Sequence[tuple[str, int, Scores]]]) -> Training:
    folder = home / "models" / name
    own = scores.get(model_content_key(folder), ())
    metrics = read_metrics(run / METRICS_FILE)
    steps = [line for line in metrics if "loss" in line]
    by_seed = {part: {seed: figures for name, seed, figures in own if name == part} for part in ("heldout", *TUNED)}
    return Training(
        name=name,
        folder=folder,
        metrics=metrics,
        tokens=int(steps[-1]["tokens"]),
        seconds=sum(line["seconds"] for line in steps),
        heldout=by_seed["heldout"].get(0, {}),
        tuned={part: tuple(by_seed[part][seed] for seed in sorted(by_seed[part])) for part in TUNED if by_seed[part]},
    )


def _with_sets(one: Training, parts: Collection[str]) -> Training:
    return replace(one, tuned={part: runs for part, runs in one.tuned.items() if part in parts})


def _speed(folders: Mapping[str, Path]) -> dict[str, Any]:
    models = {kind: load_model(folder) for kind, folder in folders.items()}
    return {
        "parameters": {kind: parameter_counts(one.model)["with_head"] for kind, one in models.items()},
        "bytes": {kind: size_on_disk(one.folder) for kind, one in models.items()},
        "latency": latency(models, runs=15, budget=20.0),
    }


# ---- values ------------------------------------------------------------------------------------------------


def set_result(trainings: Sequence[Training], part: str) -> SetResult:
    """The main metric of a set over training seeds; over fine-tuning seeds where only one training exists."""
    metric = METRICS[part]
    if part == "heldout":
        values = tuple(float(one.heldout[metric]) for one in trainings if one.heldout)
        return SetResult(part, metric, values, error=trainings[0].heldout.get("top1_se", 0.0))
    by_training = [[float(run[metric]) for run in one.tuned[part]] for one in trainings if part in one.tuned]
    if not by_training:
        return SetResult(part, metric, reason="no scores yet")
    return SetResult(part, metric, tuple(by_training[0] if len(by_training) == 1 else map(fmean, by_training)))


def counts_of(trainings: Sequence[Training], part: str) -> Array:
    """Counts of every held-out block or test row by training and seed [S, N, 2]; part is a set, "kl" or "teacher"."""
    heldout = {"heldout": "hits", "kl": "kl", "teacher": "teacher_hits"}
    if part in heldout:
        return np.concatenate([block_counts(one.heldout, heldout[part]) for one in trainings])
    metric = METRICS[part]
    return np.stack([row_counts(metric, run["predictions"]) for one in trainings for run in one.tuned.get(part, ())])


def comparison(evidence: Evidence, kind: str, baseline: str) -> dict[str, dict[str, dict[str, float]]]:
    """Ratio and difference of one kind to another: top-1 ("heldout"), KL, and the sets on which both have scores."""
    one, other = evidence.trainings[kind], evidence.trainings[baseline]
    if baseline == TEACHER:
        found = {"heldout": paired_difference(counts_of(one, "heldout"), counts_of(one, "teacher"))}
    else:
        found = {part: paired_difference(counts_of(one, part), counts_of(other, part)) for part in ("heldout", "kl")}
    for part in TUNED:
        if all(any(part in training.tuned for training in trainings) for trainings in (one, other)):
            found[part] = paired_difference(counts_of(one, part), counts_of(other, part))
    return found


def mean_with_interval(values: Sequence[float], digits: int, factor: float = 1.0, error: float = 0.0) -> str:
    """Mean ± half of its 95 % interval; for a single value from its standard error `error`, where that is known."""
    if not values:
        return "-"
    found = over_seeds([factor * value for value in values])
    half = found["high"] - found["mean"] if "high" in found else factor * Z_95 * error
    return f"{found['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


# ---- the table ---------------------------------------------------------------------------------------------


def table(evidence: Evidence) -> list[list[str]]:
    """Header and rows of cells, one row per kind."""
    header = ["model", "trainings", "million tokens", "minutes", "top-1 %", "perplexity", "KL, nats"]
    header += ["NER F1", "PAWS-X", "XNLI", "million parameters", "ms per 32 x 128 tokens"]
    return [header, *(_row(evidence, kind) for kind in evidence.trainings)]


def _row(evidence: Evidence, kind: str) -> list[str]:
    trainings = evidence.trainings[kind]
    heldout = [one.heldout for one in trainings if one.heldout]
    top1 = set_result(trainings, "heldout")
    tuned = [set_result(trainings, part).values for part in TUNED]
    return [
        kind,
        str(len(trainings)),
        f"{trainings[0].tokens / 1e6:.1f}",
        f"{fmean(one.seconds for one in trainings) / 60:.0f}",
        mean_with_interval(top1.values, 1, 100, top1.error),
        mean_with_interval([one["perplexity"] for one in heldout], 1),
        "" if kind == TEACHER else mean_with_interval([one["kl"] for one in heldout if "kl" in one], 3),
        *(mean_with_interval(values, 1, 100) for values in tuned),
        f"{evidence.speed['parameters'][kind] / 1e6:.1f}",
        f"{evidence.speed['latency']['ms'][kind]['32']:.0f}",
    ]


def differences(evidence: Evidence, student: str = "student") -> list[str]:
    """One sentence per kind with its difference to the student, and one with the student's ratio to the teacher."""
    lines = []
    if TEACHER in evidence.trainings:
        ratios = comparison(evidence, student, TEACHER)
        shares = [f"{part} {_interval(one['ratio'], 100, 1)} %" for part, one in ratios.items() if "ratio" in one]
        lines.append(f"{student} / {TEACHER}: " + ", ".join(shares))
    for kind in evidence.trainings:
        if kind not in (student, TEACHER):
            found = comparison(evidence, kind, student)
            parts = [
                f"{part} {_interval(one['difference'], 100, 1)} points" for part, one in found.items() if part != "kl"
            ]
            parts.append(f"KL {_interval(found['kl']['difference'], 1, 3)} nats")
            lines.append(f"{kind} minus {student}: " + ", ".join(parts))
    return lines


def _interval(value: Mapping[str, float], factor: float, digits: int) -> str:
    number, low, high = (f"{factor * value[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{number} [{low}, {high}]"


# ---- figures -----------------------------------------------------------------------------------------------


def scores_figure(evidence: Evidence, kinds: Sequence[str] = ("student", TEACHER, "control")) -> bytes:
    """The figure of the score flow, over training seeds, as PNG."""
    ratios = {
        part: found["ratio"] for part, found in comparison(evidence, kinds[0], TEACHER).items() if "ratio" in found
    }
    models = [
        ModelSummary(
            kind,
            tuple(set_result(evidence.trainings[kind], part) for part in ("heldout", *TUNED)),
            parameters=evidence.speed["parameters"][kind],
            size=evidence.speed["bytes"][kind],
            milliseconds={int(rows): ms for rows, ms in evidence.speed["latency"]["ms"][kind].items()},
            ratios=ratios if kind == kinds[0] else {},
        )
        for kind in kinds
        if kind in evidence.trainings
    ]
    return render_figure("The proof", models)


def training_curves(evidence: Evidence) -> bytes:
    """Loss on masked tokens in training and top-1 on held-out blocks over tokens, one line per training, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind in sorted(evidence.trainings, key=PLOT_ORDER.index):
        round_, number = divmod(PLOT_ORDER.index(kind), len(COLOURS))
        for first, one in enumerate(evidence.trainings[kind]):
            label = kind if first == 0 else None
            style = {"color": COLOURS[number], "linewidth": 1.2, "label": label, "linestyle": "--" if round_ else "-"}
            left.plot(*_smooth(one), **style)
            right.plot(*_validations(one), **style)
    for axes, title in ((left, "loss on masked tokens in training, nats"), (right, "held-out masked top-1, %")):
        axes.set_title(title, fontsize=11.5, loc="left")
        axes.set_xlabel("million tokens")
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _smooth(one: Training, lines: int = 10) -> tuple[list[float], list[float]]:
    """Million tokens and MLM loss, averaged over groups of `lines` lines of metrics."""
    steps = [line for line in one.metrics if line.get("mlm")]
    groups = [steps[start : start + lines] for start in range(0, len(steps), lines)]
    return [group[-1]["tokens"] / 1e6 for group in groups], [fmean(line["mlm"] for line in group) for group in groups]


def _validations(one: Training) -> tuple[list[float], list[float]]:
    """Million tokens and held-out top-1 in per cent of every validation."""
    tokens = {line["step"]: line["tokens"] / 1e6 for line in one.metrics if "loss" in line}
    validations = [line for line in one.metrics if "heldout_top1" in line and line["step"] in tokens]
    return [tokens[line["step"]] for line in validations], [100 * line["heldout_top1"] for line in validations]
