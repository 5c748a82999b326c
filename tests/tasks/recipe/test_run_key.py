"""The run key: which settings it covers, and the key of the same run in an older version."""

from typing import Any

from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import key_of_run, key_of_run_schema_1

SCHEMA_1 = {
    "cached": "33921e315bdeb7a34f93a7b1ad503942ad849a4af5f1f6e781e9ca08333c2a12",
    "online": "901073ee2e20d8011e3124c6da65833e3fc70dc78bd7fdea4f966074ec9508fb",
}
"""Keys of `recipe_of` per targets.source, computed by the last version that had schema 1."""

PARTS = [("a" * 64, "b" * 64), ("c" * 64,)]
ORIGIN: Any = {"teacher_fingerprint": "d" * 64, "start": "", "counts": "e" * 64}


def recipe_of(source: str = "cached", **train: object) -> Recipe:
    values = {"name": "tiny", "corpus": {"url": "unused"}, "teacher": {"model": "teacher"}}
    return make_recipe(values | {"targets": {"source": source}, "train": train}, "test")


def key(heldout: str = "", **train: object) -> str:
    return key_of_run(recipe_of(**train), PARTS, heldout=[heldout], **ORIGIN)


def test_the_key_under_schema_1_is_that_of_the_older_version() -> None:
    for source, expected in SCHEMA_1.items():
        assert key_of_run_schema_1(recipe_of(source), PARTS, **ORIGIN) == expected
        assert key_of_run(recipe_of(source), PARTS, heldout=(), **ORIGIN) != expected


def test_train_result_is_in_the_key() -> None:
    assert key(result="best") != key()


def test_validation_is_in_the_key_only_where_it_chooses_the_weights() -> None:
    assert key("f", validate_steps=7, validate_rows=7) == key()
    best = key(result="best")
    assert key("f", result="best") != best
    assert key(result="best", validate_steps=7) != best
    assert key(result="best", validate_rows=7) != best


def test_settings_that_do_not_change_the_weights_are_not_in_the_key() -> None:
    for moved in ({"micro_rows": 2}, {"ranks": 2}, {"log_steps": 7}, {"threads": 2}, {"device": "cpu"}):
        assert key(**moved) == key()  # type: ignore[arg-type]
    for changed in ({"lr": 2e-3}, {"seed": 1}, {"batch_rows": 5}, {"max_steps": 31}):
        assert key(**changed) != key()  # type: ignore[arg-type]
