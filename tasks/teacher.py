"""The teacher: finds its folder, names it by a fingerprint, loads it checked and frozen.

    teacher = load_teacher(recipe.teacher)            # on the GPU if there is one
    key = fingerprint_of(recipe.teacher)              # the same in any folder and on any machine

Called by tasks.teach, tasks.build, tasks.lineage and the scores. Weights are safetensors, or .bin files read with
weights_only; code that comes with a model runs only if the recipe says teacher.trust_remote_code.
"""

import json
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from storage.error import FatalError
from storage.fingerprint import canonical_json, sha256_bytes, sha256_file
from tasks.config import Dtype, Teacher
from tasks.hub import download, is_hub_id
from tasks.student import set_dropout
from tasks.vocabulary import Vocabulary, fits, load_vocabulary

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In this order, as transformers looks for them; either may be an index (`….index.json`) of several files."""

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.py", "pytorch_model*.bin")
_VOLATILE = {"transformers_version", "torch_dtype", "dtype"}
"""Config entries that say who saved the model, not what it computes; so do all that begin with an underscore."""


@dataclass(frozen=True)
class TeacherModel:
    """A masked language model in evaluation mode, without gradients.

    `vocab_size` are the rows of its decoder; it may have a few more than its tokenizer has pieces. `width` is D.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    settings: Teacher
    fingerprint: str
    width: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype


def load_teacher(teacher: Teacher, device: str = "auto") -> TeacherModel:
    """Loads the teacher; `device` is auto, cpu or cuda.

    FatalError: no weights, damaged or incomplete weights, a tokenizer that does not fit, no such device.
    """
    where = _device(device)
    dtype = resolve_dtype(teacher.dtype, where)
    folder = resolve_model(teacher.model, teacher.revision)
    vocabulary = load_vocabulary(teacher.model, teacher.revision, teacher.trust_remote_code)
    # Any: transformers' own types change with what else is imported.
    model: Any = load_weights(teacher, folder, dtype)
    model.eval().requires_grad_(False).to(where)
    decoder = model.get_output_embeddings()
    if decoder is None:
        raise FatalError(f"teacher {teacher.model} has no LM head; take a masked language model", teacher.model)
    vocab_size = int(decoder.weight.shape[0])
    fits(vocabulary, vocab_size, teacher.model)
    return TeacherModel(
        model=model,
        vocabulary=vocabulary,
        settings=teacher,
        fingerprint=teacher_fingerprint(folder, teacher),
        width=int(model.config.hidden_size),
        vocab_size=vocab_size,
        device=where,
        dtype=dtype,
    )


@lru_cache(maxsize=1)
def shared_teacher(teacher: Teacher, device: str = "auto") -> TeacherModel:
    """One loaded teacher for all shards that a process works on. Never change the model that it holds."""
    return load_teacher(teacher, device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """A recipe's dtype, where auto means bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


# ---- which files ---------------------------------------------------------------------------------------------


def resolve_model(name: str, revision: str = "") -> Path:
    """The local folder of a model: `name` itself, or its download from the hub (once a process).

    FatalError: neither a folder nor a hub id, no config.json, no weights. RetryableError: the hub does not answer.
    """
    folder = Path(name).expanduser()
    if not (name and folder.is_dir()):
        if not is_hub_id(name) or folder.exists():
            raise FatalError(f"model {name!r}: no such folder; name a folder with a saved model or a hub id", name)
        folder = download("model", name, revision, _HUB_FILES)
    if not (folder / "config.json").is_file():
        raise FatalError(f"model {name}: there is no config.json in {folder}; save it with save_pretrained", name)
    weight_files(folder, name)
    return folder.resolve()


def weight_files(folder: Path, name: str = "") -> tuple[Path, ...]:
    """The files that hold the weights. FatalError if there are none, or if an index names one that is not there."""
    name = name or str(folder)
    for single in WEIGHTS:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return (folder / single,)
        if index.is_file():
            return _indexed_files(index, name)
    raise FatalError(
        f"model {name}: the folder {folder} has no weights (model.safetensors); copy them there or save the model with "
        "save_pretrained",
        name,
    )


def _indexed_files(index: Path, name: str) -> tuple[Path, ...]:
    """The files of an index, all of them beside it."""
    weight_map = _read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(file, str) or Path(file).name != file for file in names):
        raise FatalError(f"model {name}: {index} does not name files of its own folder; copy it again", str(index))
    files = tuple(index.parent / file for file in sorted(names))
    for file in files:
        if not file.is_file():
            raise FatalError(
                f"model {name}: {file.name} is in {index.name} but not in {index.parent}; copy it", str(file)
            )
    return files


def vocabulary_rows(teacher: Teacher) -> int | None:
    """Embedding rows of the teacher by its config.json, or None where that does not say. Errors as `resolve_model`."""
    rows = _read_json(resolve_model(teacher.model, teacher.revision) / "config.json").get("vocab_size")
    return rows if isinstance(rows, int) else None


# ---- fingerprint ---------------------------------------------------------------------------------------------


def fingerprint_of(teacher: Teacher) -> str:
    """Fingerprint of the teacher that a recipe names, without loading it."""
    return teacher_fingerprint(resolve_model(teacher.model, teacher.revision), teacher)


def scored_as(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Names a model folder for its scores: weights, config, tokenizer, and its code if that may run."""
    model = fingerprint_of(Teacher(model=str(folder), trust_remote_code=trust_remote_code))
    return sha256_bytes(canonical_json([model, load_vocabulary(str(folder)).fingerprint]))


def teacher_fingerprint(folder: Path, teacher: Teacher) -> str:
    """sha256 over weights and config, the same for a copy in another folder; with the model's code if that may run."""
    config = {
        name: value
        for name, value in _read_json(folder / "config.json").items()
        if name not in _VOLATILE and not name.startswith("_")
    }
    files = list(weight_files(folder))
    if teacher.trust_remote_code:
        files += sorted(folder.glob("*.py"))
    content = {path.name: _remembered_hash(path) for path in files}
    return sha256_bytes(canonical_json({"config": config, "files": content}))


def _remembered_hash(path: Path) -> str:
    stat = path.stat()
    return _hash(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, changed: int) -> str:
    """sha256 of a file; size and time of change are here so that a changed file is read again."""
    del size, changed
    return sha256_file(path)


# ---- loading -------------------------------------------------------------------------------------------------


def load_weights(
    teacher: Teacher, folder: Path, dtype: torch.dtype, *, role: str = "teacher", dropout: float | None = None
) -> PreTrainedModel:
    """A masked language model of which no part is random, with its own dropout or the one given.

    FatalError for weights that are damaged, of another kind of model or not whole; `role` is what it calls the model.
    """
    first = weight_files(folder, teacher.model)[0]
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=teacher.trust_remote_code, local_files_only=True)
        if dropout is not None:
            set_dropout(config, dropout)
        model, found = AutoModelForMaskedLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=teacher.attention,
            trust_remote_code=teacher.trust_remote_code,
            use_safetensors=first.suffix == ".safetensors",
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FatalError(
            f"{role} {teacher.model}: {first.name} does not load as a masked language model ({reason}); "
            "copy the model again or name another",
            str(first),
        ) from error
    if found["missing_keys"]:
        raise FatalError(
            f"{role} {teacher.model}: its weights lack {sorted(found['missing_keys'])[0]}, so part of it would be "
            "random; save it as AutoModelForMaskedLM, LM head included",
            str(first),
        )
    result: PreTrainedModel = model
    return result


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FatalError('there is no GPU here; set train.device = "auto" or "cpu"')
    return torch.device(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FatalError(f"{path}: cannot be read as JSON ({error}); copy the model again", str(path)) from error
    if not isinstance(value, dict):
        raise FatalError(f"{path}: not a JSON object; copy the model again", str(path))
    return value
