"""Loads a `Recipe` from a TOML file: merges the recipe that it extends, applies overrides and resolves paths.

    recipe = load_recipe("deployments/pilot.toml", ["train.lr=1e-3"])
    recipe = make_recipe({"name": "tiny", ...}, "form")         # from plain values, as submitted by a form

`Recipe` is defined in tasks/recipe/config.py.
"""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage.errors import FatalError
from tasks.recipe.config import Recipe, S

HOME = ".distil"
"""Default folder of local state, below the current folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides such as `train.lr=1e-3`.

    Relative paths are resolved against the folder of the file, except `home` and `store`, which are relative to the
    current folder. A file with `extends = "other.toml"` contains only the fields that differ from that recipe.

    Raises FatalError, with the names of the file and the field, if the recipe is unreadable or invalid.
    """
    values, folders = _read_with_bases(Path(path), ())
    for override in overrides:
        _override(values, override)
    recipe = with_absolute_paths(make_recipe(values, str(path)))
    for folder in folders:
        recipe = _with_paths_of_file(recipe, folder)
    return recipe


def _read_with_bases(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """Returns the values of a file merged over those of the recipe that it extends, and the folders of both files."""
    values = read_toml(path, "recipe")  # before resolve(), which fails for unreadable paths
    if path.resolve() in extending:
        raise FatalError(
            f"{path}: this recipe extends itself, directly or through another one; correct extends", str(path)
        )
    base, folder = values.pop("extends", ""), path.parent.resolve()
    if not base:
        return values, [folder]
    base_values, folders = _read_with_bases(folder / str(base), (*extending, path.resolve()))
    return _merged(base_values, values), [folder, *folders]


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merges two recipes section by section. All other values, including lists, replace those of the base."""
    shared = [name for name, value in values.items() if isinstance(value, dict) and isinstance(base.get(name), dict)]
    return base | values | {name: _merged(base[name], values[name]) for name in shared}


def make_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validates plain values. Raises FatalError, with one clause per invalid field; the message cites `where`."""
    return validated(Recipe, values, where, "recipe")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Returns the values of a TOML file; `what` is its kind in messages. Raises FatalError if it is unreadable."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FatalError(f"{path}: this {what} file does not exist; check the path", str(path)) from error
    except (ValueError, RecursionError, OSError) as error:  # ValueError: not TOML, not UTF-8, a path with a zero byte
        raise FatalError(f"{path}: not a readable TOML file ({error}); correct it", str(path)) from error


def validated(model: type[S], values: dict[str, Any], where: str, what: str) -> S:
    """Validates plain values against a section. Raises FatalError if they are invalid.

    Messages cite `where`, and `what` for faults that belong to no single field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in item['loc']) or what}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise FatalError(f"{where}: {'; '.join(faults)}", where) from error


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise FatalError(f"override {text!r}: the form must be section.field=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = raw  # an unquoted string, such as a path
    *sections, field = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise FatalError(f"override {text!r}: {section} is not a section; use section.field=value")
        values = inner
    values[field] = value


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Makes `home` and `store` absolute. Their defaults are below the current folder.

    Servers, workers and trainers have different working folders, so relative paths would differ between them. The two
    fields are not part of any key.
    """
    home = str(Path(recipe.home or HOME).absolute())
    store = recipe.store or f"{home}/store"
    return recipe.with_changes({"home": home, "store": store if "://" in store else str(Path(store).absolute())})


def _with_paths_of_file(recipe: Recipe, folder: Path) -> Recipe:
    """Makes paths that exist in the folder of the recipe file absolute, so that the recipe works from any folder."""
    paths = {
        "corpus.url": recipe.corpus.url,
        "blocks.tokenizer": recipe.blocks.tokenizer,
        "teacher.model": recipe.teacher.model,
        "train.warm_start": recipe.train.warm_start,
        "score.protocol": recipe.score.protocol,
        "score.sets": recipe.score.sets,
        "score.control": recipe.score.control,
        "watch.folder": recipe.watch.folder,
    }
    return recipe.with_changes({name: relative_to_file(path, folder) for name, path in paths.items()})


def relative_to_file(name: str, folder: Path) -> str:
    """Returns `name` as an absolute path if `folder` contains it, else unchanged (a URL or Hub id)."""
    if not name or "://" in name or Path(name).is_absolute():
        return name
    path = folder / name
    return str(path) if os.path.exists(path) else name  # Path.exists raises if the name is too long
