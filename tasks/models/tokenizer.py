"""Loads the transformers tokenizer of a model folder, with the ids of the tokenizer.json that made the blocks.

    tokenizer = exact_tokenizer(folder)             # for evaluation and fine-tuning
    name_exact_class(folder)                        # for a folder that others will load with AutoTokenizer

Some tokenizer classes of transformers 5 use only the vocabulary of tokenizer.json and apply their own rules:
CamembertTokenizer splits words at all white space, although the file may keep the no-break space of French before `:`
as a character. The model would then read different ids from those that it was trained on.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PROBE = "Œuvre\u00a0: «\u202fl'été 1\u2009000\u00a0€\u202f»… ﬁn\tÀ ½  deux\u200b\nA\u0301 — e\u0301tude № 5"
"""Text on which normalisers and pre-tokenizers differ: kinds of spaces, ligatures, combining accents, quotes."""

PLAIN = "PreTrainedTokenizerFast"
"""The class without rules of its own, by its name in transformers 4 and 5."""


def exact_tokenizer(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that AutoTokenizer loads, or a PLAIN one if its ids differ from those of tokenizer.json.

    `options` (add_prefix_space) apply to the returned tokenizer, not to the comparison. Raises the errors of
    AutoTokenizer: OSError, ValueError, KeyError.
    """
    load = partial(AutoTokenizer.from_pretrained, folder, local_files_only=True, trust_remote_code=trust_remote_code)
    found: PreTrainedTokenizerBase = load()
    if matches_tokenizer_json(found, folder):
        with_options: PreTrainedTokenizerBase = load(**options) if options else found
        return with_options
    names = found.model_input_names
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, model_input_names=names
    )
    return plain


def name_exact_class(folder: Path) -> None:
    """Sets the class in tokenizer_config.json to PLAIN if the ids of AutoTokenizer differ from those of tokenizer.json.

    A folder that AutoTokenizer cannot load is left unchanged; registering or scoring the model reports the error.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return
    if not matches_tokenizer_json(found, folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_bytes()) if path.exists() else {}
        config |= {"tokenizer_class": PLAIN, "model_input_names": found.model_input_names}
        path.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def matches_tokenizer_json(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Returns whether the tokenizer gives the ids of the folder's tokenizer.json for PROBE; True without that file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return True
    ids: list[int] = tokenizer(PROBE, add_special_tokens=False).input_ids
    return ids == Tokenizer.from_file(str(path)).encode(PROBE, add_special_tokens=False).ids
