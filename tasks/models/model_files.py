"""Resolves hub ids, finds the weight files of a model folder and computes the fingerprint of a model.

    folder = resolve_model("camembert-base")          # the folder itself, or its download from the hub
    key = fingerprint_of(recipe.teacher)              # the same in every folder and on every machine

This module loads no tensors and imports neither torch nor transformers, so commands that only need keys (`distil
status`, a run with nothing to do) start within a second.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes, sha256_file
from storage.hub import download_repository, is_hub_id
from tasks.recipe.config import TeacherSettings
from tasks.tokens.vocabulary import load_vocabulary

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weight files, in the order in which transformers searches for them. Each may be an index (`….index.json`) of
several files."""

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.py", "pytorch_model*.bin")

_VOLATILE = {"transformers_version", "torch_dtype", "dtype"}
"""Config entries that describe how the model was saved, not what it computes. Entries with a leading underscore also
do."""


def resolve_model(name: str, revision: str = "") -> Path:
    """Returns the local folder of a model: `name` itself, or its download from the hub (once per process).

    FatalError: `name` is neither a folder nor a hub id, or the folder has no config.json or no weights. RetryableError:
    the hub does not respond.
    """
    folder = Path(name).expanduser()
    if not (name and folder.is_dir()):
        if not is_hub_id(name) or folder.exists():
            raise FatalError(
                f"model {name!r} is neither a local folder nor a Hugging Face Hub id; use a folder with a saved model, "
                "or a hub id",
                name,
            )
        folder = download_repository("model", name, revision, _HUB_FILES)
    if not (folder / "config.json").is_file():
        raise FatalError(f"model {name}: {folder} has no config.json; save the model there with save_pretrained", name)
    weight_files(folder, name)
    return folder.resolve()


def weight_files(folder: Path, name: str = "") -> tuple[Path, ...]:
    """Returns the weight files of a model folder. FatalError: it has none, or a file that an index lists is missing."""
    name = name or str(folder)
    for single in WEIGHTS:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return (folder / single,)
        if index.is_file():
            return _indexed_files(index, name)
    raise FatalError(
        f"model {name}: the folder {folder} has no weights (model.safetensors); copy them there, or save the model "
        "with save_pretrained",
        name,
    )


def _indexed_files(index: Path, name: str) -> tuple[Path, ...]:
    """Returns the files that an index lists; they must be in the folder of the index."""
    weight_map = _read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(file, str) or Path(file).name != file for file in names):
        raise FatalError(f"model {name}: {index} must list files of its own folder; copy it again", str(index))
    files = tuple(index.parent / file for file in sorted(names))
    for file in files:
        if not file.is_file():
            raise FatalError(
                f"model {name}: {index.name} lists {file.name}, but {index.parent} does not contain it; copy it there",
                str(file),
            )
    return files


def vocabulary_rows(teacher: TeacherSettings) -> int | None:
    """Returns vocab_size of the teacher's config.json, or None if it is not set. Raises the errors of
    `resolve_model`."""
    rows = _read_json(resolve_model(teacher.model, teacher.revision) / "config.json").get("vocab_size")
    return rows if isinstance(rows, int) else None


# ---- fingerprint ---------------------------------------------------------------------------------------------


def fingerprint_of(teacher: TeacherSettings) -> str:
    """Computes the fingerprint of a recipe's teacher without loading it. Raises the errors of `resolve_model`."""
    return folder_fingerprint(resolve_model(teacher.model, teacher.revision), teacher)


def model_content_key(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Identifies a model by its content, for its scores: sha256 over the fingerprints of model and tokenizer."""
    model = fingerprint_of(TeacherSettings(model=str(folder), trust_remote_code=trust_remote_code))
    return sha256_bytes(canonical_json([model, load_vocabulary(str(folder)).fingerprint]))


def folder_fingerprint(folder: Path, teacher: TeacherSettings) -> str:
    """Computes sha256 over weights and config, which is the same for every copy of the model.

    If teacher.trust_remote_code is set, the *.py files are included.
    """
    config = {
        name: value
        for name, value in _read_json(folder / "config.json").items()
        if name not in _VOLATILE and not name.startswith("_")
    }
    files = list(weight_files(folder))
    if teacher.trust_remote_code:
        files += sorted(folder.glob("*.py"))
    content = {path.name: _cached_hash(path) for path in files}
    return sha256_bytes(canonical_json({"config": config, "files": content}))


def _cached_hash(path: Path) -> str:
    stat = path.stat()
    return _hash(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    """Returns the sha256 of a file; size and modification time invalidate the cached value of a changed file."""
    del size, changed
    return sha256_file(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FatalError(f"{path} cannot be read as JSON ({error}); copy the model again", str(path)) from error
    if not isinstance(value, dict):
        raise FatalError(f"{path} is not a JSON object; copy the model again", str(path))
    return value
