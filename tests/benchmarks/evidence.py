"""What the runs of the proof left behind as table, picture and curves: over training seeds, with intervals.

    evidence = gather(home, kinds)          # {"student": ("proof-student-0", ...), ...}: what was trained and scored
    table(evidence, "student"), picture_of(evidence), curves_of(evidence)

Read from the store, the runs' metrics and the saved models; nothing is computed but intervals and the time of a
forward. A figure with ± is the mean over training seeds (of each, the mean over the seeds of fine-tuning) and half of
its 95 % interval by Student's t; of a single training on held-out text by the standard error over blocks, on a
fine-tuned set over the seeds of fine-tuning. Differences and ratios are paired by held-out block or test row; their
interval is the wider of a bootstrap over those and t over seeds (tasks.eval.intervals.against).
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
from tasks.eval.intervals import NORMAL, Array, over_seeds, paired_difference
from tasks.eval.metrics import row_counts
from tasks.eval.scores import Scores, read_scores, teachers_own
from tasks.eval.side_by_side import latency, load_model, parameters, size_on_disk
from tasks.models.files import model_content_key
from tasks.release.figure import COLOURS, render_figure
from tasks.release.results import METRICS, ModelSummary, SetResult
from tasks.train.metrics import read_metrics

TUNED = ("ner", "paws-x", "xnli")
TEACHER = "teacher"
DRAWN = ("student", TEACHER, "control", "all", "scratch", "online", "no-distil", "no-cosine", "no-mlm")
"""Kinds in the order of their colours, the first three as in the picture of the scores; when the colours are used up
lines are dashed, so that `online` shows on top of `student`, which it should equal."""


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
    """Trainings by kind, and what size and speed were measured of one of each: {"parameters", "bytes", "latency"}."""

    trainings: Mapping[str, tuple[Training, ...]]
    speed: Mapping[str, Any]


def gather(home: Path, kinds: Mapping[str, Sequence[str]]) -> Evidence:
    """All trainings that there are of these names; a kind without any is left out."""
    runs = {json.loads(path.read_bytes())["name"]: path.parent for path in home.glob("run/*/run.json")}
    store = Store(home / "store")
    scores = _all_scores(store)
    found = {
        kind: tuple(_training(home, name, runs[name], scores) for name in names if (home / "models" / name).is_dir())
        for kind, names in kinds.items()
    }
    trainings = {kind: those for kind, those in found.items() if those}
    if TEACHER in trainings:  # on the text that its students are judged on, not on that of its own corpus
        own = next(
            (teachers_own(one.heldout) for those in trainings.values() for one in those if "kl" in one.heldout), {}
        )
        trainings[TEACHER] = tuple(replace(one, heldout=own) for one in trainings[TEACHER])
        # Where a scoring was stopped before the teacher's turn, there is nothing to compare with.
        parts = {part for one in trainings[TEACHER] for part in one.tuned}
        trainings = {kind: tuple(_with_sets(one, parts) for one in those) for kind, those in trainings.items()}
    return Evidence(trainings, _speed({kind: those[0].folder for kind, those in trainings.items()}))


def _all_scores(store: Store) -> dict[str, list[tuple[str, int, Scores]]]:
    """By model: set, seed and figures of all that was ever scored, oldest first.

    Of held-out text only by the protocol of most: a champion is scored anew on the text of a later snapshot.
    """
    receipts = sorted(store.receipts("scores"), key=lambda receipt: receipt.created)
    protocols = Counter(_protocol(one) for one in receipts if one.settings["set"] == "heldout")
    most = max(protocols, key=protocols.__getitem__, default="")
    found: dict[str, list[tuple[str, int, Scores]]] = {}
    for receipt in receipts:
        part = receipt.settings["set"]
        if part != "heldout" or _protocol(receipt) == most:
            figures = read_scores(store, receipt.ref)
            found.setdefault(receipt.parents[0], []).append((part, receipt.settings["seed"], figures))
    return found


def _protocol(receipt: Receipt) -> str:
    return json.dumps(receipt.settings["protocol"], sort_keys=True)


def _training(home: Path, name: str, run: Path, scores: Mapping[str, Sequence[tuple[str, int, Scores]]]) -> Training:
    folder = home / "models" / name
    own = scores.get(model_content_key(folder), ())
    metrics = read_metrics(run / "metrics.jsonl")
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
    contenders = {kind: load_model(folder) for kind, folder in folders.items()}
    return {
        "parameters": {kind: parameters(one.model)["with_head"] for kind, one in contenders.items()},
        "bytes": {kind: size_on_disk(one.folder) for kind, one in contenders.items()},
        "latency": latency(contenders, runs=15, budget=20.0),
    }


# ---- figures -----------------------------------------------------------------------------------------------


def standing_of(trainings: Sequence[Training], part: str) -> SetResult:
    """The deciding figure of a set over training seeds; over those of fine-tuning where there was one training."""
    metric = METRICS[part]
    if part == "heldout":
        values = tuple(float(one.heldout[metric]) for one in trainings if one.heldout)
        return SetResult(part, metric, values, error=trainings[0].heldout.get("top1_se", 0.0))
    by_training = [[float(run[metric]) for run in one.tuned[part]] for one in trainings if part in one.tuned]
    if not by_training:
        return SetResult(part, metric, reason="no scores yet")
    return SetResult(part, metric, tuple(by_training[0] if len(by_training) == 1 else map(fmean, by_training)))


def counts_of(trainings: Sequence[Training], part: str) -> Array:
    """What every held-out block or test row adds, by training and seed [S, N, 2]; part is a set, "kl" or "teacher"."""
    heldout = {"heldout": "hits", "kl": "kl", "teacher": "teacher_hits"}
    if part in heldout:
        return np.concatenate([block_counts(one.heldout, heldout[part]) for one in trainings])
    metric = METRICS[part]
    return np.stack([row_counts(metric, run["predictions"]) for one in trainings for run in one.tuned.get(part, ())])


def compared(evidence: Evidence, ours: str, theirs: str) -> dict[str, dict[str, dict[str, float]]]:
    """Ratio and difference of one kind to another: top-1 ("heldout"), KL, and the sets that both have scores of."""
    one, other = evidence.trainings[ours], evidence.trainings[theirs]
    if theirs == TEACHER:
        found = {"heldout": paired_difference(counts_of(one, "heldout"), counts_of(one, "teacher"))}
    else:
        found = {part: paired_difference(counts_of(one, part), counts_of(other, part)) for part in ("heldout", "kl")}
    for part in TUNED:
        if all(any(part in training.tuned for training in trainings) for trainings in (one, other)):
            found[part] = paired_difference(counts_of(one, part), counts_of(other, part))
    return found


def spread(values: Sequence[float], digits: int, factor: float = 1.0, error: float = 0.0) -> str:
    """Mean ± half of its 95 % interval; of a single value by its standard error, where that is known."""
    if not values:
        return "-"
    found = over_seeds([factor * value for value in values])
    half = found["high"] - found["mean"] if "high" in found else factor * NORMAL * error
    return f"{found['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


# ---- the table ---------------------------------------------------------------------------------------------


def table(evidence: Evidence) -> list[list[str]]:
    """Heading and rows of cells, one row a kind."""
    header = ["model", "trainings", "million tokens", "minutes", "top-1 %", "perplexity", "KL, nats"]
    header += ["NER F1", "PAWS-X", "XNLI", "million parameters", "ms for 32 x 128"]
    return [header, *(_row(evidence, kind) for kind in evidence.trainings)]


def _row(evidence: Evidence, kind: str) -> list[str]:
    trainings = evidence.trainings[kind]
    heldout = [one.heldout for one in trainings if one.heldout]
    top1 = standing_of(trainings, "heldout")
    tuned = [standing_of(trainings, part).values for part in TUNED]
    return [
        kind,
        str(len(trainings)),
        f"{trainings[0].tokens / 1e6:.1f}",
        f"{fmean(one.seconds for one in trainings) / 60:.0f}",
        spread(top1.values, 1, 100, top1.error),
        spread([one["perplexity"] for one in heldout], 1),
        "" if kind == TEACHER else spread([one["kl"] for one in heldout if "kl" in one], 3),
        *(spread(values, 1, 100) for values in tuned),
        f"{evidence.speed['parameters'][kind] / 1e6:.1f}",
        f"{evidence.speed['latency']['ms'][kind]['32']:.0f}",
    ]


def differences(evidence: Evidence, student: str = "student") -> list[str]:
    """One sentence for each kind against the student, and what the student keeps of its teacher."""
    lines = []
    if TEACHER in evidence.trainings:
        kept = compared(evidence, student, TEACHER)
        shares = [f"{part} {_interval(one['ratio'], 100, 1)} %" for part, one in kept.items() if "ratio" in one]
        lines.append(f"{student} / {TEACHER}: " + ", ".join(shares))
    for kind in evidence.trainings:
        if kind not in (student, TEACHER):
            found = compared(evidence, kind, student)
            parts = [
                f"{part} {_interval(one['difference'], 100, 1)} points" for part, one in found.items() if part != "kl"
            ]
            parts.append(f"KL {_interval(found['kl']['difference'], 1, 3)} nats")
            lines.append(f"{kind} minus {student}: " + ", ".join(parts))
    return lines


def _interval(value: Mapping[str, float], factor: float, digits: int) -> str:
    number, low, high = (f"{factor * value[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{number} [{low}, {high}]"


# ---- pictures ----------------------------------------------------------------------------------------------


def picture_of(evidence: Evidence, kinds: Sequence[str] = ("student", TEACHER, "control")) -> bytes:
    """The picture of the scores work, over training seeds, as PNG."""
    ratios = {part: found["ratio"] for part, found in compared(evidence, kinds[0], TEACHER).items() if "ratio" in found}
    models = [
        ModelSummary(
            kind,
            tuple(standing_of(evidence.trainings[kind], part) for part in ("heldout", *TUNED)),
            parameters=evidence.speed["parameters"][kind],
            size=evidence.speed["bytes"][kind],
            milliseconds={int(rows): ms for rows, ms in evidence.speed["latency"]["ms"][kind].items()},
            ratios=ratios if kind == kinds[0] else {},
        )
        for kind in kinds
        if kind in evidence.trainings
    ]
    return render_figure("The proof", models)


def curves_of(evidence: Evidence) -> bytes:
    """Loss of masked tokens in training and top-1 on held-out blocks, over tokens, a line a training: PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind in sorted(evidence.trainings, key=DRAWN.index):
        round_, number = divmod(DRAWN.index(kind), len(COLOURS))
        for first, one in enumerate(evidence.trainings[kind]):
            label = kind if first == 0 else None
            style = {"color": COLOURS[number], "linewidth": 1.2, "label": label, "linestyle": "--" if round_ else "-"}
            left.plot(*_smooth(one), **style)
            right.plot(*_looks(one), **style)
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
    """Million tokens and the mean MLM loss of so many lines of metrics."""
    steps = [line for line in one.metrics if line.get("mlm")]
    groups = [steps[start : start + lines] for start in range(0, len(steps), lines)]
    return [group[-1]["tokens"] / 1e6 for group in groups], [fmean(line["mlm"] for line in group) for group in groups]


def _looks(one: Training) -> tuple[list[float], list[float]]:
    """Million tokens and held-out top-1 in per cent, look by look."""
    tokens = {line["step"]: line["tokens"] / 1e6 for line in one.metrics if "loss" in line}
    looks = [line for line in one.metrics if "heldout_top1" in line and line["step"] in tokens]
    return [tokens[line["step"]] for line in looks], [100 * line["heldout_top1"] for line in looks]
