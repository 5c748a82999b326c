"""Writes the sections of the model card about scores, size and speed.

    parts = score_sections(models)      # ModelSummary values -> Markdown headings, tables and paragraphs

The first model is the subject of the card; the others are its teacher and any control.
"""

from collections.abc import Iterator, Mapping, Sequence

from tasks.release.markdown import escape_line, table
from tasks.release.redact import without_paths
from tasks.release.results import ModelSummary, SetResult, half_width, names_of_sets, teacher_among

CLS = "Accuracy on {}, labelled positive or negative (CLS, as in FLUE), after fine-tuning."

SET_DESCRIPTIONS = {
    "heldout": "Masked top-1 accuracy: share of the masked positions in held-out text of the training corpus where the "
    "most probable token is the original token.",
    "ner": "F1 over named entities of the test split, after fine-tuning. An entity is correct if its type and its "
    "first and last word are correct (as in seqeval).",
    "cls": CLS.format("product reviews of books, DVDs and music"),
    "cls-books": CLS.format("product reviews of books"),
    "cls-dvd": CLS.format("product reviews of DVDs"),
    "cls-music": CLS.format("product reviews of music"),
    "paws-x": "Accuracy on sentence pairs that are paraphrases or not (PAWS-X), after fine-tuning.",
    "xnli": "Accuracy on sentence pairs, labelled entailment, neutral or contradiction (XNLI), after fine-tuning.",
    "fine-tuning": "All sets that need fine-tuning.",
}
"""Meaning of the score on each set."""


def score_sections(models: Sequence[ModelSummary]) -> list[str]:
    """Returns the scores with their meaning, the sets that were not run with the reason, and any size and speed."""
    return ["## Scores", *_scores(models), *_not_run(models), *_size_and_speed(models)]


def _scores(models: Sequence[ModelSummary]) -> Iterator[str]:
    """Yields the table of scores, an explanation of it, and the meaning of the score on each set."""
    student, ratios = models[0], models[0].ratios
    names = names_of_sets(models)
    rows = []
    for name in names:
        metric = next(one.metric for model in models for one in model.set_results if one.set_name == name)
        cells = [_score(model.result_on(name)) for model in models]
        cells += [_ratio(ratios.get(name))] if ratios else []
        rows.append((escape_line(f"{name}, {metric}" if metric else name), *cells))
    yield table(_header("set, metric", models), rows, numeric=True)
    yield (
        "All scores are percentages; higher is better. A score over several seeds is their mean ± half the 95 % "
        "confidence interval (Student's t), followed by the number of seeds. Held-out text is scored once, and its "
        "interval is over blocks of text."
    )
    if ratios:
        yield (
            f"The last column is the score of the {escape_line(student.name)} divided by the teacher's score, with a "
            "95 % confidence interval paired by test row: the smallest interval that contains both a bootstrap over "
            "rows and Student's t over seeds."
        )
    meanings = [f"- {name}: {SET_DESCRIPTIONS[name]}" for name in names if name in SET_DESCRIPTIONS]
    if meanings:
        yield "\n".join(meanings)


def _header(first: str, models: Sequence[ModelSummary]) -> list[str]:
    names = [escape_line(model.name) for model in models]
    return [first, *names, *([f"{names[0]} / teacher"] if models[0].ratios else [])]


def _score(result: SetResult | None) -> str:
    if result is None:
        return "not run"
    half, seeds = half_width(result), len(result.values)
    text = f"{100 * result.mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")
    return f"{text} ({seeds})" if seeds > 1 else text


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""


def _not_run(models: Sequence[ModelSummary]) -> Iterator[str]:
    """Yields a list of the sets without a score, each with the reason."""
    missing = [
        f"- {escape_line(one.set_name)} ({escape_line(model.name)}): "
        + (escape_line(without_paths(one.reason)) or "no reason was recorded")
        for model in models
        for one in model.set_results
        if not one.was_run
    ]
    if missing:
        yield "### Not run"
        yield "\n".join(missing)


def _size_and_speed(models: Sequence[ModelSummary]) -> Iterator[str]:
    measures = {
        "parameters, million": [model.parameters / 1e6 for model in models],
        "weights, MB": [model.size / 1e6 for model in models],
    }
    for size in sorted({size for model in models for size in model.milliseconds}):
        measures[f"CPU, batch {size}, ms"] = [model.milliseconds.get(size, 0.0) for model in models]
    teacher = teacher_among(models)
    rows = []
    for name, values in measures.items():
        cells = [(f"{value:,.1f}" if value >= 1 else f"{value:.2g}") if value else "not measured" for value in values]
        if models[0].ratios:
            of_teacher = values[models.index(teacher)] if teacher else 0.0
            cells.append(f"{values[0] / of_teacher:.2f}" if of_teacher else "")
        rows += [(name, *cells)] if any(values) else []
    if rows:
        yield "## Size and speed"
        yield table(_header("measure", models), rows, numeric=True)
        yield (
            "Parameters and weights include the masked-LM head. A CPU time is the median time of one forward pass of "
            "the encoder, in milliseconds and 32-bit floating point; the batch is the number of texts."
        )
