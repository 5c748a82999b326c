"""Loads the vocabulary of a tokenizer: its size, its special token ids, and a fingerprint for the keys of blocks.

    vocabulary = load_vocabulary("../camembert-base")      # a folder with tokenizer.json, or a hub id
    tokenizer = load_tokenizer(vocabulary)                 # the `tokenizers` object, truncation and padding off

tokenizer.json, tokenizer_config.json and special_tokens_map.json are parsed without transformers, so that worker
processes start fast.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.hub import download_repository, is_hub_id
from tasks.recipe.config import BlockSettings, TeacherSettings

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

SLACK = 256
"""A model has fewer than this many embedding rows without a token; such rows are padding for speed."""

CACHED_WORDS = 100_000
"""Words in the tokenizer's cache, about 25 MB. With the default of 10,000, fewer than the distinct words of a French
corpus, tokenization is a third slower. The ids do not depend on the cache."""

_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # role -> (names in the configuration, usual spellings if the configuration has none).
    # cls and sep come first: the model was pre-trained with them around every text.
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "bos": (("cls_token", "bos_token"), ("<s>", "[CLS]")),
    "eos": (("sep_token", "eos_token"), ("</s>", "[SEP]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
}


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a tokenizer.

    `size`: ids that a model can receive, 0 to size - 1 (camembert-base: 32005, although `len(tokenizer)` is 32006).
    `specials`: ids that are never masked and never drawn as random tokens, ascending. `unknowns`: the special ids that
    mean "unknown" (camembert-base has two, 3 and 4; `unk` is the configured one). `fingerprint`: sha256 over
    tokenizer.json and the special ids; independent of `name` and `folder`.
    """

    name: str = field(compare=False)
    folder: str = field(compare=False)
    fingerprint: str
    size: int
    pad: int
    bos: int
    eos: int
    mask: int
    unk: int
    specials: tuple[int, ...]
    unknowns: tuple[int, ...]


@lru_cache(maxsize=16)
def load_vocabulary(name: str, revision: str = "", trust_remote_code: bool = False) -> Vocabulary:
    """Loads the vocabulary of a folder or hub id, cached per process.

    `trust_remote_code` has no effect, since tokenizer.json contains no code.

    FatalError: the folder, hub id, tokenizer.json or a special token does not exist. RetryableError: the hub does not
    respond.
    """
    del trust_remote_code
    folder = tokenizer_folder(name, revision)
    definition = _read_json(folder / "tokenizer.json", name)
    config = _configuration(folder, name)
    tokenizer = _tokenizer(folder)
    roles = {role: _role_id(role, config, tokenizer, name) for role in _ROLES}
    unknowns = sorted({roles["unk"]} | _model_unknown(definition["model"], tokenizer))
    size = _size(definition, tokenizer, roles)
    added = {token["id"] for token in definition.get("added_tokens", []) if token.get("special")}
    specials = sorted({token for token in added | set(roles.values()) | set(unknowns) if token < size})
    # Truncation and padding are switched off when the tokenizer is used, so they do not change the ids.
    content = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    fingerprint = sha256_bytes(canonical_json({"tokenizer": content, "roles": roles, "specials": specials}))
    return Vocabulary(name, str(folder), fingerprint, size, **roles, specials=tuple(specials), unknowns=tuple(unknowns))


def vocabulary_for(blocks: BlockSettings, teacher: TeacherSettings) -> Vocabulary:
    """Loads the vocabulary of a recipe: that of blocks.tokenizer if set, else that of the teacher at its revision."""
    if blocks.tokenizer:
        return load_vocabulary(blocks.tokenizer)
    return load_vocabulary(teacher.model, teacher.revision)


def load_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Returns the tokenizer with truncation and padding off, cached per process."""
    return _tokenizer(Path(vocabulary.folder))


def check_vocabulary_fits(vocabulary: Vocabulary, model_vocab_size: int, model_name: str) -> None:
    """Raises FatalError unless the model has an embedding row for every token and fewer than SLACK extra rows."""
    if not 0 <= model_vocab_size - vocabulary.size < SLACK:
        raise FatalError(
            f"the tokenizer {vocabulary.name} has {vocabulary.size} tokens, but the model {model_name} has "
            f"{model_vocab_size} embedding rows; set blocks.tokenizer to the tokenizer of this model",
            vocabulary.name,
        )


def tokenizer_folder(name: str, revision: str = "") -> Path:
    """Returns the local folder of a tokenizer's files: `name` itself, or its download from the hub.

    Raises the same errors as `load_vocabulary`.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            raise FatalError(_no_tokenizer(name), str(folder))
        return folder.resolve()
    if not is_hub_id(name) or folder.exists():
        raise FatalError(
            f"tokenizer {name!r} is neither a local folder nor a Hugging Face Hub id; "
            "use a folder with tokenizer.json or a hub id",
            name,
        )
    folder = download_repository("tokenizer", name, revision, FILES)
    if not (folder / "tokenizer.json").is_file():
        raise FatalError(_no_tokenizer(name), name)
    return folder


def _no_tokenizer(name: str) -> str:
    return (
        f"tokenizer {name} has no tokenizer.json; create it with "
        f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER) and use that folder"
    )


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception for every fault in the file
        message = f"{path} is not a valid tokenizer file ({error}); write it again with save_pretrained"
        raise FatalError(message, str(path)) from error
    if hasattr(tokenizer.model, "_resize_cache"):  # Unigram and BPE
        tokenizer.model._resize_cache(CACHED_WORDS)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FatalError(f"tokenizer {name}: {path} cannot be read ({error}); copy it again", str(path)) from error
    if not isinstance(value, dict):
        raise FatalError(f"tokenizer {name}: {path} is not a JSON object; copy it again", str(path))
    return value


def _configuration(folder: Path, name: str) -> dict[str, Any]:
    """Merges the two optional configuration files; tokenizer_config.json takes precedence."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            found |= {key: value for key, value in _read_json(folder / file, name).items() if value is not None}
    return found


def _role_id(role: str, config: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> int:
    fields, spellings = _ROLES[role]
    named = [config[entry] for entry in fields if entry in config]
    texts = [token["content"] if isinstance(token, dict) else str(token) for token in named]
    for text in (*texts, *spellings):
        token_id = tokenizer.token_to_id(text)
        if token_id is not None:
            return int(token_id)
    raise FatalError(
        f"tokenizer {name} has no {fields[0]}, which a masked language model needs; "
        f"add {fields[0]} to its tokenizer_config.json or use a different tokenizer",
        name,
    )


def _model_unknown(model: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    """Returns the id of unknown text in the tokenizer's model, if any: Unigram stores an id, other models a token."""
    if model.get("unk_id") is not None:
        return {int(model["unk_id"])}
    token_id = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return set() if token_id is None else {int(token_id)}


def _size(definition: Mapping[str, Any], tokenizer: Tokenizer, roles: Mapping[str, int]) -> int:
    """Returns one more than the highest id of an ordinary token or a special token with a role.

    Special tokens without a role that were added after the vocabulary (camembert-base: 32005 `<unk>NOTUSED`) have no
    embedding row in the model.
    """
    pieces = tokenizer.get_vocab(with_added_tokens=False).values()
    added = [token["id"] for token in definition.get("added_tokens", []) if not token.get("special")]
    return int(max([*pieces, *roles.values(), *added])) + 1
