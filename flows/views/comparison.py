"""Makes tables that compare the scores of several models, with one column per model. Pure functions.

    table = comparison_table("small, large", scored.scores)

A cell with ± contains a mean and half the width of its 95 % interval: Student's t over seeds or, on held-out text, the
standard error over blocks. Ratios and differences are paired by test row (or held-out block); their interval is the
wider of a bootstrap over the pairs and Student's t over seeds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flows.views.tables import Rows, Table, number, size
from tasks.eval.intervals import Z_95
from tasks.eval.scores import teacher_figures, was_run

Scores = Mapping[str, Any]

Models = Mapping[str, Mapping[str, Scores]]

SUBWORD = "sub-word F1, weighted, O included"

METRIC_ROWS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "accuracy": (("accuracy",), ("macro_f1",)),
    "entity_f1": (
        ("entity_f1",),
        ("entity", "precision"),
        ("entity", "recall"),
        ("subword", "weighted_f1"),
        ("as_published", "entity_f1"),
    ),
}
"""Metrics of a fine-tuned data set that have a row, by the main metric of the data set. MLflow has all metrics."""

METRIC_LABELS = {
    ("macro_f1",): "macro F1",
    ("entity_f1",): "entity F1",
    ("entity", "precision"): "entity precision",
    ("entity", "recall"): "entity recall",
    ("subword", "weighted_f1"): SUBWORD,
    ("as_published", "entity_f1"): "entity F1, duplicates kept",
}


def comparison_table(title: str, models: Models) -> Table:
    """Returns a table of held-out text, fine-tuned data sets, size and speed.

    The last column is the ratio of the first model to the teacher.
    """
    first = next(iter(models))
    ratio = "teacher" in models or "teacher_top1" in models[first].get("heldout", {})
    shown = dict(models)
    if ratio and "teacher" not in models:
        shown["teacher"] = {}
    rows = [*_heldout_rows(shown, first), *_rows_of_sets(shown, first), *_size_rows(shown, models[first])]
    header = ["", *shown, *([f"{first} / teacher"] if ratio else [])]
    return Table(title, {"": [row[: len(header)] for row in rows]}, header)


def fill_mask_table(models: Models) -> Table | None:
    """Returns a table of each model's most likely tokens at the mask, and how often they agree with the last model's.

    Returns None if fill-mask was not run.
    """
    figures = next(iter(models.values())).get("fill-mask", {})
    if not figures.get("rows"):
        return None
    names = _in_order(models, figures["rows"][0]["answers"])
    rows = [
        [row["sentence"], *("\n".join(map(_answer, row["answers"][name])) for name in names)] for row in figures["rows"]
    ]
    if len(names) > 1:
        rows.append([f"top-1 agreement with {names[-1]}", *(agreement(figures, name, names[-1]) for name in names)])
    return Table("Fill-mask", {"": rows}, ["sentence", *names])


def _in_order(models: Models, values: Mapping[str, Any]) -> list[str]:
    """Returns the names in the order of the models, the teacher last. Stored scores are in alphabetical order."""
    return [name for name in dict.fromkeys([*models, "teacher"]) if name in values]


def agreement(figures: Scores, one: str, other: str) -> str:
    """Describes how often two models agree: sentences with the same first token, and mean number of shared tokens."""
    if one == other:
        return ""
    tokens = [
        [[answer["token"] for answer in row["answers"][name]] for name in (one, other)] for row in figures["rows"]
    ]
    same = sum(ours[0] == theirs[0] for ours, theirs in tokens)
    shared = sum(len(set(ours) & set(theirs)) for ours, theirs in tokens) / len(tokens)
    return f"{same} of {len(tokens)}, {shared:.1f} of {figures['top']} tokens shared"


def notes(models: Models) -> Rows:
    """Returns rows of notes.

    They contain the scores that were not run and why, the differences from the first model, and the numbers of rows and
    rules of the data sets.
    """
    lines: list[tuple[str, str]] = []
    lacking: dict[tuple[str, str], list[str]] = {}
    for model, scores in models.items():
        for reason, parts in not_run_parts(scores):
            lacking.setdefault((", ".join(parts), reason), []).append(model)
        lines += [(f"{part} ({model})", str(one["note"])) for part, one in scores.items() if "note" in one]
    lines += [(f"{parts} ({', '.join(names)})", f"not run: {reason}") for (parts, reason), names in lacking.items()]
    lines += [(f"{model} minus {next(iter(models))}", text) for model, text in _differences(models)]
    for part, figures in next(iter(models.values())).items():
        if "counts" in figures:
            lines.append((part, f"{counted(figures['counts'])}; {figures['rule']}"))
            rates = {model: scores[part]["lr"] for model, scores in models.items() if "lr" in scores.get(part, {})}
            lines.append(("", "learning rate " + ", ".join(f"{model} {lr:g}" for model, lr in rates.items())))
    return lines


def _differences(models: Models) -> Iterator[tuple[str, str]]:
    """Yields each model but the first with its differences from the first model by data set."""
    for model, scores in models.items():
        parts = []
        for part, figures in scores.items():
            found = figures.get("against_first", {})
            if "difference" in found:
                metric = figures.get("metric", "top1").replace("_", " ")
                parts.append(f"{part} {metric} {_signed(found['difference'], 100, 1)} points")
            if "kl_difference" in found:
                parts.append(f"KL to the teacher {_signed(found['kl_difference'], 1, 3)} nats")
        if parts:
            yield model, ", ".join(parts)


def _signed(value: Mapping[str, float], factor: float, digits: int) -> str:
    number, low, high = (f"{factor * value[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{number} [{low}, {high}]"


def not_run_parts(scores: Mapping[str, Scores]) -> Iterator[tuple[str, list[str]]]:
    """Yields each reason why scores of a model were not run, with the names of these scores."""
    reasons: dict[str, list[str]] = {}
    for part, figures in scores.items():
        if not was_run(figures):
            reasons.setdefault(figures["reason"], []).append(part)
    yield from reasons.items()


def counted(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Describes the number of rows used per split, and of dropped, duplicate and overlapping rows."""
    labels = {
        "dropped": "dropped",
        "duplicates": "duplicates removed",
        "in_other_split": "found in another split and removed",
        "also_in_train": "kept although in train",
    }
    parts = []
    for split in ("train", "validation", "test"):
        about = [f"{number(counts[split][name])} {label}" for name, label in labels.items() if counts[split].get(name)]
        parts.append(f"{split} {number(counts[split]['kept'])}" + (f" ({', '.join(about)})" if about else ""))
    return ", ".join(parts)


# ---- rows --------------------------------------------------------------------------------------------------


def _heldout_rows(models: Models, first: str) -> Iterator[list[str]]:
    figures = {name: dict(scores.get("heldout", {})) for name, scores in models.items()}
    if figures.get("teacher") == {}:
        figures["teacher"] = teacher_figures(figures[first])

    def row(title: str, text: Callable[[Scores], str]) -> list[str]:
        return [title, *(text(one) for one in figures.values())]

    yield [*row("held-out top-1, %", _top1), ratio_text(figures[first])]
    yield [*row("held-out perplexity", lambda one: f"{one['perplexity']:.1f}" if "perplexity" in one else ""), ""]
    if any("kl" in one for one in figures.values()):
        yield [*row("KL to the teacher, nats", lambda one: f"{one['kl']:.3f}" if "kl" in one else ""), ""]
        same = [f"{100 * one['agreement']:.1f}" if "agreement" in one else "" for one in figures.values()]
        yield ["top-1 agreement, %", *same, ""]


def _top1(figures: Scores) -> str:
    if "top1" not in figures:
        return "not run" if figures else ""
    return f"{100 * figures['top1']:.1f} ± {100 * Z_95 * figures['top1_se']:.1f}"


def _rows_of_sets(models: Models, first: str) -> Iterator[list[str]]:
    names = [part for part, figures in models[first].items() if "metric" in figures or _not_run_anywhere(models, part)]
    for part in names:
        metric = next((scores[part]["metric"] for scores in models.values() if "metric" in scores.get(part, {})), "")
        if not metric:
            yield [part, *("not run" if part in scores else "" for scores in models.values()), ""]
        for path in METRIC_ROWS.get(metric, ()):
            cells = [_over_seeds(scores.get(part, {}), path) for scores in models.values()]
            main = path == METRIC_ROWS[metric][0]
            ratio = ratio_text(models[first][part]) if main else ""
            yield [f"{part} {METRIC_LABELS.get(path, path[-1])}, %", *cells, ratio]


def _not_run_anywhere(models: Models, part: str) -> bool:
    own = ("heldout", "fill-mask", "size-and-speed", "fine-tuning")
    return part not in own and any(not was_run(scores.get(part, {})) for scores in models.values())


def _over_seeds(figures: Scores, path: Sequence[str]) -> str:
    if "summary" not in figures:
        return "not run" if figures else ""
    value = figures["summary"]
    for name in path:
        value = value[name]
    return spread_text(value)


def spread_text(value: Mapping[str, float]) -> str:
    """Returns a mean in percent, ± half the width of its 95 % interval."""
    half = f" ± {100 * (value['high'] - value['mean']):.1f}" if "high" in value else ""
    return f"{100 * value['mean']:.1f}{half}"


def ratio_text(figures: Scores) -> str:
    """Returns the ratio to the teacher with its 95 % interval, or "" if there is none."""
    ratio = figures.get("against_teacher", {}).get("ratio")
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""


def _size_rows(models: Models, scores: Mapping[str, Scores]) -> Iterator[list[str]]:
    figures = scores.get("size-and-speed", {})
    if "parameters" not in figures:
        return

    def row(title: str, values: Mapping[str, float], text: Callable[[float], str], ratio: str = ".2f") -> list[str]:
        first = next(iter(models))
        against = format(values[first] / values["teacher"], ratio) if "teacher" in values and len(values) > 1 else ""
        return [title, *(text(values[name]) if name in values else "" for name in models), against]

    parameters = {name: both["with_head"] for name, both in figures["parameters"].items()}
    yield row("parameters", parameters, number)
    yield row("weights", figures["bytes"], size)
    times = figures["latency"]
    for batch in times.get("runs", {}):
        by_model = {name: by[batch] for name, by in times["ms"].items()}
        yield row(f"CPU ms, batch {batch}, {times['tokens']} tokens", by_model, lambda ms: f"{ms:.1f}")


def _answer(answer: Mapping[str, Any]) -> str:
    return f"{answer['token']} {100 * answer['probability']:.0f} %"
