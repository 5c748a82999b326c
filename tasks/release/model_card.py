"""Writes the model card: the README.md of a saved model, with the metadata of the Hugging Face Hub.

    text = model_card(facts)        # CardFacts -> Markdown with YAML front matter

The card is generated from the recipe, receipts and scores; sets without scores are listed with the reason. Untrusted
text (names, reasons, sentences) is escaped in the Markdown and in the YAML.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from storage.hub import is_hub_id
from tasks.recipe.config import Recipe
from tasks.release.card_scores import score_sections
from tasks.release.markdown import code_block, code_span, escape_line, table
from tasks.release.redact import public_name
from tasks.release.results import ModelSummary, retained_share, teacher_among

HUB_METRICS = {"top1": "accuracy", "accuracy": "accuracy", "entity_f1": "f1", "macro_f1": "f1"}
"""Names of the metrics on the hub."""

LOSSES = (
    ("distil", "distillation loss", "T² × KL(teacher ‖ student)"),
    ("cosine", "cosine loss", "(1 − cosine similarity of the last hidden states)"),
    ("mlm", "masked-LM loss", "cross-entropy of the masked tokens"),
)
"""Name in the recipe, name in the card, and definition of each loss term."""

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class CardFacts:
    """Contents of the card.

    The first of `models` is the subject of the card; `sizes` contains sizes of the corpus by name (shards, documents,
    tokens ...); `seconds` is the time in training steps, 0 if unknown; `figure` is the name of an image file in the
    folder of the card, or "".
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
    figure: str = ""


def model_card(facts: CardFacts) -> str:
    """Returns the complete README.md."""
    front_matter = yaml.safe_dump(metadata(facts), allow_unicode=True, sort_keys=False, default_flow_style=False)
    parts = [
        f"# {escape_line(facts.name)}",
        _opening(facts),
        f"![Scores, size and speed]({facts.figure})" if facts.figure else "",
        *score_sections(facts.models),
        "## Use",
        _use(facts),
        "## How it was made",
        *(f"### {heading}\n\n{_two_columns(rows)}" for heading, rows in _sections(facts).items()),
        _origin(facts),
    ]
    return f"---\n{front_matter}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def metadata(facts: CardFacts) -> dict[str, object]:
    """Returns the front matter as plain values, with the field names of the hub and without unknown values."""
    recipe = facts.recipe
    results = [result for model in facts.models[:1] for result in model.set_results if result.was_run]
    metrics = [HUB_METRICS.get(result.metric, result.metric) for result in results]
    values: dict[str, object] = {
        "language": recipe.corpus.language,
        "license": recipe.register_as.license,
        "base_model": public_name(recipe.teacher.model),
        "datasets": [recipe.register_as.dataset] if recipe.register_as.dataset else [],
        "metrics": list(dict.fromkeys(metrics)),
        "pipeline_tag": "fill-mask",
        "library_name": "transformers",
        "tags": ["distillation", "masked-language-model", recipe.name],
    }
    return {name: value for name, value in values.items() if value}


# ---- sections ----------------------------------------------------------------------------------------------


def _opening(facts: CardFacts) -> str:
    recipe = facts.recipe
    text = f"A masked language model with {facts.layers} layers, "
    if not recipe.loss.needs_teacher:
        return text + "trained without a teacher."
    text += f"distilled from {code_span(public_name(recipe.teacher.model))}."
    teacher = teacher_among(facts.models)
    share = retained_share(facts.models[0], teacher) if teacher else None
    if teacher and share is not None:
        text += (
            f" It retains {100 * share:.1f} % of the scores of its {escape_line(teacher.name)}, on average over the "
            "sets that both were scored on under the same protocol."
        )
    return text


def _use(facts: CardFacts) -> str:
    sentence = next(iter(facts.recipe.score.sentences), "<mask>")
    model = re.sub(r"[^A-Za-z0-9._/-]", "-", facts.name)
    code = f"""from transformers import pipeline

fill = pipeline("fill-mask", model="{model}")   # or the folder of this file
fill({sentence!r}.replace("<mask>", fill.tokenizer.mask_token))"""
    return code_block(code, "python")


def _sections(facts: CardFacts) -> dict[str, Rows]:
    return {
        "Corpus": _corpus(facts),
        "Teacher and student": _models(facts),
        "Objective": _objective(facts.recipe),
        "Training": _training(facts),
    }


def _corpus(facts: CardFacts) -> Rows:
    corpus = facts.recipe.corpus
    shown = corpus.url if "://" not in corpus.url and is_hub_id(corpus.url) else public_name(corpus.url)
    return [
        ("text", facts.recipe.register_as.dataset or shown),
        ("snapshot", facts.snapshot[:16]),
        *((name, f"{count:,}") for name, count in facts.sizes.items()),
        ("filters", _filters(facts.recipe)),
        ("block", f"{facts.recipe.blocks.length} tokens, {facts.recipe.blocks.packing}"),
    ]


def _filters(recipe: Recipe) -> str:
    corpus = recipe.corpus
    filters = [f"language {corpus.language or 'any'} (probability ≥ {corpus.min_language_prob:g})"]
    filters += [f"without the warnings {', '.join(corpus.drop_warnings)}"] if corpus.drop_warnings else []
    filters += [f"harmful_pp ≥ {corpus.min_harmful_pp:g}"] if corpus.min_harmful_pp is not None else []
    filters += ["exact duplicates dropped within a shard"] if corpus.deduplicate else []
    return "; ".join(filters)


def _models(facts: CardFacts) -> Rows:
    recipe = facts.recipe
    choice = ", ".join(map(str, recipe.student.choice)) or "evenly spaced"
    initial = {
        "teacher": f"layers of the teacher, {choice}; embeddings and LM head copied",
        "scratch": "the teacher's configuration, random weights",
        "config": "its own configuration, random weights",
    }[recipe.student.init]
    rows = [("teacher", public_name(recipe.teacher.model) or "none")]
    rows += [("teacher's revision", recipe.teacher.revision)] if recipe.teacher.revision else []
    if recipe.train.warm_start:
        initial = f"warm start, all weights of {public_name(recipe.train.warm_start)}"
    return [
        *rows,
        ("student", f"{facts.layers} layers"),
        ("initial weights", initial),
        ("dropout", f"{recipe.student.dropout:g}"),
    ]


def _objective(recipe: Recipe) -> Rows:
    loss, targets = recipe.loss, recipe.targets
    rows = [(label, f"{getattr(loss, name):g} × {definition}") for name, label, definition in LOSSES]
    rows += [("masks", f"{100 * recipe.mask.rate:g} % of the positions, {recipe.mask.kind}")]
    if loss.needs_teacher:
        encoding = f"hidden states as {targets.encoding}" if targets.source == "cached" else "computed during training"
        rows += [
            ("temperature", f"{loss.temperature:g}"),
            ("positions with distillation and cosine loss", targets.positions),
            ("teacher signal", f"{targets.source}, {encoding}"),
        ]
    return rows


def _training(facts: CardFacts) -> Rows:
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
        ("time in training steps", _duration(facts.seconds)),
        ("hardware", facts.hardware or "not recorded"),
        ("software", ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or "not recorded"),
    ]


def _duration(seconds: float) -> str:
    """Formats a duration in hours and minutes, or below one hour in minutes and seconds."""
    if not seconds:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _origin(facts: CardFacts) -> str:
    recipe, run, model = (code_span(text) for text in (facts.recipe.name, facts.run_key[:16], facts.model_key[:16]))
    return f"Recipe {recipe}, run {run}, model {model}."


def _two_columns(rows: Rows) -> str:
    return table(("", ""), [(escape_line(name), escape_line(value)) for name, value in rows])
