"""The sections of a recipe: copies with changes, labels of the form, rules across fields."""

from typing import Any

import pytest

from storage.errors import FatalError
from tasks.recipe.config import Recipe, Section
from tasks.recipe.load import make_recipe

VALUES: dict[str, Any] = {"name": "small", "corpus": {"url": "texts"}, "teacher": {"model": "teacher"}}


def test_with_changes_replaces_fields_of_the_recipe_and_its_sections() -> None:
    recipe = make_recipe(VALUES, "test")
    changed = recipe.with_changes(
        {"name": "other", "train.lr": 1e-3, "train.epochs": 2.0, "corpus.url": "more", "register.name": "student"}
    )
    expected = VALUES | {
        "name": "other",
        "train": {"lr": 1e-3, "epochs": 2.0},
        "corpus": {"url": "more"},
        "register": {"name": "student"},
    }
    assert changed == make_recipe(expected, "test")
    assert recipe == make_recipe(VALUES, "test")
    assert recipe.with_changes({}) == recipe


@pytest.mark.parametrize("name", ["nmae", "train.learning_rate", "trian.lr", "train.lr.peak", "train."])
def test_with_changes_rejects_unknown_fields(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        make_recipe(VALUES, "test").with_changes({name: 1})


def sections() -> dict[str, type[Section]]:
    found = {field.alias or name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        name: section for name, section in found.items() if isinstance(section, type) and issubclass(section, Section)
    }


@pytest.mark.parametrize("name", sections())
def test_every_field_has_a_label_and_every_section_a_heading(name: str) -> None:
    section = sections()[name]
    assert all(field.description for field in section.model_fields.values())
    schema = section.model_json_schema()
    assert schema["description"]
    assert schema["title"] == section.__name__.removesuffix("Settings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, "requires a teacher; set teacher.model"),
        ({"loss": {"distil": 0, "cosine": 0, "mlm": 0}}, "set at least one of them to a positive weight"),
        ({"student": {"choice": [0, 2], "layers": 3}}, "student.choice must list exactly student.layers layers"),
        ({"student": {"init": "config"}}, "requires a model_type in student.config"),
        ({"targets": {"encoding": "topk"}}, "stores no hidden states, so loss.cosine must be 0"),
        ({"corpus": {"url": "texts", "min_chars": 9, "max_chars": 8}}, "corpus.max_chars is below corpus.min_chars"),
        ({"store": "s3://key:secret@bucket/store"}, "store contains a password"),
        ({"train": {"launcher": ["srun", "trainer"]}}, "train.launcher must contain {run}"),
        ({"gate": {"needed": ["ner"], "optional": ["ner"]}}, "gate.needed and gate.optional both contain ner"),
    ],
)
def test_contradictory_settings_are_rejected_with_their_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FatalError, match=message):
        make_recipe(VALUES | changes, "test")
