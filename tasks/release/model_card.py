"""The model card: README.md of a saved model, with the metadata that the Hugging Face Hub reads, made from figures.

    text = model_card(facts)        # CardFacts -> Markdown with a YAML head

Called by the flows after scoring. Nothing is written by hand: what was not run says so, with its reason. What comes
from outside (names, reasons, sentences) cannot break out of its line or cell, nor out of the YAML.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from storage.errors import printable
from tasks.recipe.config import Recipe
from tasks.release.results import ModelSummary, SetResult, half_width, kept, set_names, teacher_among

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

PLACE = re.compile(r"""[a-z][a-z0-9+.-]*://[^\s'"]+|(?:/[^\s/;:,'"]+){2,}/?""")

METRICS = {"top1": "accuracy", "accuracy": "accuracy", "entity_f1": "f1", "macro_f1": "f1"}
"""Names of metrics as the hub knows them."""

LOSSES = (
    ("distil", "T² × KL(teacher ‖ student)"),
    ("cosine", "1 − cos of last hidden states"),
    ("mlm", "masked cross-entropy"),
)

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class CardFacts:
    """All that the card tells. `models` begins with the model itself; `seconds` is time in training steps, 0 unknown.

    `sizes` counts the corpus by name (shards, documents, blocks, tokens ...); `picture` is the name of a file beside
    the card, or "".
    """

    name: str
    recipe: Recipe
    models: tuple[ModelSummary, ...]
    snapshot: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    hardware: str = ""
    run_key: str = ""
    model_key: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    picture: str = ""


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    head = yaml.safe_dump(metadata(facts), allow_unicode=True, sort_keys=False, default_flow_style=False)
    parts = [
        f"# {_line(facts.name)}",
        _opening(facts),
        f"![Scores, size and speed]({facts.picture})" if facts.picture else "",
        "## Scores",
        _scores(facts.models),
        *_not_run(facts.models),
        "## Use",
        _use(facts),
        "## How it was made",
        *(f"### {heading}\n\n{_table(rows)}" for heading, rows in _sections(facts).items() if rows),
        _origin(facts),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def metadata(facts: CardFacts) -> dict[str, object]:
    """The head of the card as plain values, with the names of the hub; what is unknown is left out."""
    recipe = facts.recipe
    metrics = [
        METRICS.get(one.metric, one.metric) for model in facts.models[:1] for one in model.set_results if one.was_run
    ]
    values: dict[str, object] = {
        "language": recipe.corpus.language,
        "license": recipe.register_as.license,
        "base_model": plain_name(recipe.teacher.model),
        "datasets": [recipe.register_as.dataset] if recipe.register_as.dataset else [],
        "metrics": list(dict.fromkeys(metrics)),
        "pipeline_tag": "fill-mask",
        "library_name": "transformers",
        "tags": ["distillation", "masked-language-model", recipe.name],
    }
    return {name: value for name, value in values.items() if value}


def plain_name(place: str) -> str:
    """A hub id as it is; of a folder or URL its last part only: a card names no machine and no key of a store."""
    if HUB_ID.fullmatch(place):
        return place
    return place.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def without_places(text: str) -> str:
    """A sentence with the last part only of every path and URL in it."""
    return PLACE.sub(lambda found: plain_name(found.group()), text)


# ---- sections ----------------------------------------------------------------------------------------------


def _opening(facts: CardFacts) -> str:
    recipe = facts.recipe
    if not recipe.loss.needs_teacher:
        return f"A masked language model of {facts.layers} layers, trained without a teacher."
    text = (
        f"A masked language model of {facts.layers} layers, distilled from {_code(plain_name(recipe.teacher.model))}."
    )
    teacher = teacher_among(facts.models)
    share = kept(facts.models[0], teacher) if teacher else None
    if teacher and share is not None:
        text += f" It keeps {100 * share:.1f} % of the scores of its {_line(teacher.name)} under one protocol."
    return text


def _scores(models: tuple[ModelSummary, ...]) -> str:
    """Every set, with all models side by side, and their size and speed."""
    ratios = models[0].ratios
    names = [*(_line(model.name) for model in models), *([f"{_line(models[0].name)} / teacher"] if ratios else [])]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for name in set_names(models):
        metric = next(one.metric for model in models for one in model.set_results if one.set_name == name)
        cells = [_figure(model.standing(name)) for model in models]
        cells += [_ratio(ratios.get(name))] if ratios else []
        lines.append(f"| {_line(f'{name}, {metric}' if metric else name)} | {' | '.join(cells)} |")
    lines += _measures(models)
    note = (
        "Scores in per cent: mean ± half the 95 % interval over seeds (Student's t), and the number of seeds; on "
        "held-out text of a single run, over its blocks."
    )
    if ratios:
        note += " Ratios with a 95 % interval, paired by test row: the wider of a bootstrap over rows and t over seeds."
    return "\n".join(lines) + f"\n\n{note}"


def _measures(models: Sequence[ModelSummary]) -> Iterator[str]:
    rows = {
        "parameters, million": [model.parameters / 1e6 for model in models],
        "weights, MB": [model.size / 1e6 for model in models],
    }
    for size in sorted({size for model in models for size in model.milliseconds}):
        rows[f"CPU, batch {size}, ms"] = [model.milliseconds.get(size, 0.0) for model in models]
    teacher = teacher_among(models)
    for name, values in rows.items():
        if any(values):
            cells = [
                (f"{value:,.1f}" if value >= 1 else f"{value:.2g}") if value else "not measured" for value in values
            ]
            if models[0].ratios:
                theirs = values[models.index(teacher)] if teacher else 0.0
                cells.append(f"{values[0] / theirs:.2f}" if theirs else "")
            yield f"| {name} | {' | '.join(cells)} |"


def _figure(standing: SetResult | None) -> str:
    if standing is None:
        return "not run"
    half, seeds = half_width(standing), len(standing.values)
    text = f"{100 * standing.mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")
    return f"{text} ({seeds})" if seeds > 1 else text


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""


def _not_run(models: tuple[ModelSummary, ...]) -> Iterator[str]:
    """What has no figure, and why."""
    missing = [
        f"- {_line(one.set_name)} ({_line(model.name)}): {_line(without_places(one.reason)) or 'no reason was given'}"
        for model in models
        for one in model.set_results
        if not one.was_run
    ]
    if missing:
        yield "### Not run"
        yield "\n".join(missing)


def _use(facts: CardFacts) -> str:
    sentence = next(iter(facts.recipe.score.sentences), "<mask>")
    code = f"""from transformers import pipeline

fill = pipeline("fill-mask", model="{re.sub(r"[^A-Za-z0-9._/-]", "-", facts.name)}")   # or the folder of this file
fill({sentence!r}.replace("<mask>", fill.tokenizer.mask_token))"""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", code))]))
    return f"{fence}python\n{code}\n{fence}"


def _sections(facts: CardFacts) -> dict[str, Pairs]:
    return {
        "Corpus": _corpus(facts),
        "Teacher and student": _models(facts),
        "Objective": _objective(facts.recipe),
        "Training": _training(facts),
    }


def _corpus(facts: CardFacts) -> Pairs:
    corpus = facts.recipe.corpus
    shown = corpus.url if "://" not in corpus.url and HUB_ID.fullmatch(corpus.url) else plain_name(corpus.url)
    return [
        ("text", facts.recipe.register_as.dataset or shown),
        ("snapshot", facts.snapshot[:16]),
        *((name, f"{count:,}") for name, count in facts.sizes.items()),
        ("filters", _filters(facts.recipe)),
        ("a block", f"{facts.recipe.blocks.length} tokens, {facts.recipe.blocks.packing}"),
    ]


def _filters(recipe: Recipe) -> str:
    corpus = recipe.corpus
    said = [f"language {corpus.language or 'any'} (probability ≥ {corpus.min_language_prob:g})"]
    said += [f"without warnings {', '.join(corpus.drop_warnings)}"] if corpus.drop_warnings else []
    said += [f"harmful_pp ≥ {corpus.min_harmful_pp:g}"] if corpus.min_harmful_pp is not None else []
    said += ["exact duplicates dropped within a shard"] if corpus.deduplicate else []
    return "; ".join(said)


def _models(facts: CardFacts) -> Pairs:
    recipe = facts.recipe
    choice = ", ".join(map(str, recipe.student.choice)) or "evenly spread"
    start = {
        "teacher": f"layers of the teacher, {choice}; embeddings and LM head copied",
        "scratch": "the teacher's shape, random weights",
        "config": "a config of its own, random weights",
    }[recipe.student.init]
    rows = [("teacher", plain_name(recipe.teacher.model) or "none")]
    rows += [("teacher's revision", recipe.teacher.revision)] if recipe.teacher.revision else []
    if recipe.train.warm_start:
        start = f"warm start, all weights of {plain_name(recipe.train.warm_start)}"
    return [
        *rows,
        ("student", f"{facts.layers} layers"),
        ("started from", start),
        ("dropout", f"{recipe.student.dropout:g}"),
    ]


def _objective(recipe: Recipe) -> Pairs:
    loss, targets = recipe.loss, recipe.targets
    rows = [(name, f"{getattr(loss, name):g} × {what}") for name, what in LOSSES]
    rows += [("masks", f"{100 * recipe.mask.rate:g} % of the positions, {recipe.mask.kind}")]
    if loss.needs_teacher:
        encoding = f"hidden states as {targets.encoding}" if targets.source == "cached" else "teacher in the loop"
        rows += [
            ("temperature", f"{loss.temperature:g}"),
            ("positions with distil and cosine", targets.positions),
            ("teacher's word", f"{targets.source}, {encoding}"),
        ]
    return rows


def _training(facts: CardFacts) -> Pairs:
    train = facts.recipe.train
    return [
        ("steps", f"{facts.steps:,} of {train.batch_rows:,} blocks"),
        ("tokens", f"{facts.tokens:,}"),
        ("learning rate", f"{train.lr:g}, {train.schedule}, {100 * train.warmup:g} % warm-up"),
        (
            "AdamW",
            f"betas {train.betas[0]:g}, {train.betas[1]:g}; weight decay {train.weight_decay:g}; clip {train.clip:g}",
        ),
        ("seed", str(train.seed)),
        ("time in steps", _duration(facts.seconds)),
        ("hardware", facts.hardware or "not recorded"),
        ("software", ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or "not recorded"),
    ]


def _duration(seconds: float) -> str:
    """Hours and minutes, or seconds where it was quick."""
    if not seconds:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _origin(facts: CardFacts) -> str:
    return f"Recipe {_code(facts.recipe.name)}, run {_code(facts.run_key[:16])}, model {_code(facts.model_key[:16])}."


# ---- escaping ----------------------------------------------------------------------------------------------


def _table(rows: Pairs) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_line(name)} | {_line(value)} |" for name, value in rows)])


def _line(text: str) -> str:
    """Outside text as one line of Markdown: no cell, link, tag or heading begins in it."""
    line = printable(" ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", line)


def _code(text: str) -> str:
    """Outside text as inline code."""
    line = " ".join(printable(str(text)).replace("`", "'").split()).replace("|", "¦")
    return f"`{line}`" if line else "``"
