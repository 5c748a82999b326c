"""Makes recipes for tests: the values of a minimal recipe, and the text of a recipe whose run takes seconds.

make_recipe(recipe_values(home=str(folder), gate={"approval": True}), "test")
path.write_text(recipe_toml(home=folder / "home", corpus=folder / "corpus", teacher=folder / "teacher"))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe

LENGTH = 32
STEPS = 20

TINY: Mapping[str, Any] = {
    "name": "tiny",
    "corpus": {"heldout_per_mille": 100, "shard_bytes": 10_000},
    "blocks": {"length": LENGTH},
    "student": {"layers": 2},
    "train": {
        "batch_rows": 6,
        "max_steps": STEPS,
        "lr": 1e-3,
        "checkpoint_steps": 4,
        "validate_steps": 10,
        "validate_rows": 8,
        "log_steps": 1,
        "threads": 1,
        "device": "cpu",
    },
    "score": {"heldout_rows": 16, "latency_runs": 0},
    "run": {"workers": 2},
}
"""Values for a run of a few seconds on one core, without corpus.url and teacher.model."""


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with changes: a mapping changes fields of a section, any other value replaces the old one."""
    return {**values} | {
        name: {**values.get(name, {}), **change} if isinstance(change, Mapping) else change
        for name, change in changes.items()
    }


def recipe_values(**changes: Any) -> dict[str, Any]:
    """Returns the values of a minimal valid recipe, with changes such as `gate={"approval": True}`."""
    return merged({"name": "tiny", "corpus": {"url": "corpus"}, "teacher": {"model": "teacher"}}, changes)


def simple_recipe(**changes: Any) -> Recipe:
    """Makes the recipe of `recipe_values`."""
    return make_recipe(recipe_values(**changes), "test")


def teacherless_recipe(tokenizer: Path, **changes: Any) -> Recipe:
    """Makes a recipe that trains a small RoBERTa from random weights by MLM only; it has a tokenizer but no teacher."""
    values = {
        "name": "tiny",
        "blocks": {"length": LENGTH, "tokenizer": str(tokenizer)},
        "loss": {"distil": 0, "cosine": 0, "mlm": 1},
        "student": {"init": "config", "config": {"model_type": "roberta"}},
    }
    return make_recipe(merged(values, changes), "test")


def recipe_toml(
    *, home: Path | None = None, corpus: Path | str | Mapping[str, Any], teacher: Path | str, **changes: Any
) -> str:
    """Returns the text of the TINY recipe for a corpus (its URL, or its section) and a teacher, with changes."""
    source = corpus if isinstance(corpus, Mapping) else {"url": str(corpus)}
    values = merged(TINY, {"corpus": source, "teacher": {"model": str(teacher)}})
    values = merged(values, changes) | ({"home": str(home)} if home else {})
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    parts = [_lines(plain), *(f"[{name}]\n{_lines(fields)}" for name, fields in sections.items())]
    return "\n\n".join(parts) + "\n"


def _lines(fields: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
