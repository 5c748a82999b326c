"""From a recipe file to a checked `Recipe`: TOML, what it extends, overrides, paths beside the file.

    recipe = load_recipe("deployments/pilot.toml", ["train.lr=1e-3"])
    recipe = make_recipe({"name": "tiny", ...}, "form")         # of plain values, as a form gives them

The sections and their fields are in tasks/recipe/config.py.
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
"""The default home, below the current folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides such as `train.lr=1e-3`; relative paths are the file's own, but
    `home` and `store` lie below the current folder.

    A file may say `extends = "other.toml"` and name only what differs from that recipe.
    FatalError that names the file and the field where something does not fit.
    """
    values, folders = _read_with_bases(Path(path), ())
    for override in overrides:
        _override(values, override)
    recipe = with_absolute_paths(make_recipe(values, str(path)))
    for folder in folders:
        recipe = _with_paths_of_file(recipe, folder)
    return recipe


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The values of a file over those of the recipe that it extends, and the folders of both."""
    values = read_toml(path, "recipe")  # first: what can be read can be resolved
    if path.resolve() in above:
        raise FatalError(f"{path}: extends itself; name another recipe", str(path))
    base, folder = values.pop("extends", ""), path.parent.resolve()
    if not base:
        return values, [folder]
    below, folders = _read_with_bases(folder / str(base), (*above, path.resolve()))
    return _merged(below, values), [folder, *folders]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Section by section; a list or a value replaces the one below it."""
    shared = [name for name, value in above.items() if isinstance(value, dict) and isinstance(below.get(name), dict)]
    return below | above | {name: _merged(below[name], above[name]) for name in shared}


def make_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validates plain values. FatalError with one line a field."""
    return validated(Recipe, values, where, "recipe")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The plain values of a file. FatalError: no such file (`what` says of which sort), or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FatalError(f"{path}: no such {what} file", str(path)) from error
    except (ValueError, RecursionError, OSError) as error:  # ValueError: not TOML, not UTF-8, a path with a zero byte
        raise FatalError(f"{path}: not a readable TOML file ({error})", str(path)) from error


def validated(model: type[S], values: dict[str, Any], where: str, what: str) -> S:
    """Validates plain values against a section. FatalError with one line a field; `what` stands for the whole."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or what}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise FatalError(f"{where}: {'; '.join(lines)}", where) from error


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise FatalError(f"override {text!r}: write section.field=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = raw  # a bare word or path
    *sections, field = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise FatalError(f"override {text!r}: {section} is not a section")
        values = inner
    values[field] = value


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with `home` and `store` filled in, as whole paths below the current folder.

    Both are in no key. Servers, workers and trainers have working folders of their own, and so have the runs of a
    deployment, whose recipe has the folders of whoever deployed it (with containers: inside the image).
    """
    home = str(Path(recipe.home or HOME).absolute())
    store = recipe.store or f"{home}/store"
    return recipe.model_copy(update={"home": home, "store": store if "://" in store else str(Path(store).absolute())})


def _with_paths_of_file(recipe: Recipe, folder: Path) -> Recipe:
    """Makes paths that lie beside the recipe file absolute, so that the recipe works from any folder."""
    return recipe.model_copy(
        update={
            "corpus": recipe.corpus.model_copy(update={"url": relative_to_file(recipe.corpus.url, folder)}),
            "blocks": recipe.blocks.model_copy(update={"tokenizer": relative_to_file(recipe.blocks.tokenizer, folder)}),
            "teacher": recipe.teacher.model_copy(update={"model": relative_to_file(recipe.teacher.model, folder)}),
            "train": recipe.train.model_copy(update={"warm_start": relative_to_file(recipe.train.warm_start, folder)}),
            "score": recipe.score.model_copy(
                update={
                    "protocol": relative_to_file(recipe.score.protocol, folder),
                    "sets": relative_to_file(recipe.score.sets, folder),
                    "control": relative_to_file(recipe.score.control, folder),
                }
            ),
            "watch": recipe.watch.model_copy(update={"folder": relative_to_file(recipe.watch.folder, folder)}),
        }
    )


def relative_to_file(name: str, folder: Path) -> str:
    """`name` as an absolute path if such a file or folder lies in `folder`, else unchanged (URL, hub id)."""
    if not name or "://" in name or Path(name).is_absolute():
        return name
    there = folder / name
    return str(there) if os.path.exists(there) else name  # Path.exists raises at names longer than a disk takes
