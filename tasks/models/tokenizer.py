"""The tokenizer of a model folder as transformers loads it, held to the tokenizer.json that made the blocks.

    tokenizer = exact_tokenizer(folder)             # for scores and fine-tuning
    name_exact_class(folder)                        # for a folder that others will load with AutoTokenizer

Some classes of transformers 5 keep of tokenizer.json only the pieces and put their own rules beside them:
CamembertTokenizer parts words at every white space, where the file may know the no-break space that French has before
`:` as a character. Then a model would be used on other ids than it was trained on.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PROBE = "Œuvre\u00a0: «\u202fl'été 1\u2009000\u00a0€\u202f»… ﬁn\tÀ ½  deux\u200b\nA\u0301 — e\u0301tude № 5"
"""What rules of normalising and parting differ in: spaces of all sorts, ligatures, accents apart, dots, quotes."""

PLAIN = "PreTrainedTokenizerFast"
"""The class that has no rules of its own, by the name that transformers 4 and 5 know."""


def exact_tokenizer(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """What AutoTokenizer loads, or a plain tokenizer where that would read a text otherwise than tokenizer.json.

    `options` are how it is to be used (add_prefix_space), so the comparison is without them. OSError, ValueError,
    KeyError: as AutoTokenizer.
    """
    load = partial(AutoTokenizer.from_pretrained, folder, local_files_only=True, trust_remote_code=trust_remote_code)
    found: PreTrainedTokenizerBase = load()
    if reads_as_its_file(found, folder):
        wanted: PreTrainedTokenizerBase = load(**options) if options else found
        return wanted
    names = found.model_input_names
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, model_input_names=names
    )
    return plain


def name_exact_class(folder: Path) -> None:
    """Where AutoTokenizer would read a text otherwise than tokenizer.json, makes tokenizer_config.json name the plain
    class. A folder that AutoTokenizer cannot load stays as it is: who registers or scores it says why."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return
    if not reads_as_its_file(found, folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_bytes()) if path.exists() else {}
        config |= {"tokenizer_class": PLAIN, "model_input_names": found.model_input_names}
        path.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def reads_as_its_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether both give the same ids of PROBE; true where there is no tokenizer.json to differ from."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return True
    ids: list[int] = tokenizer(PROBE, add_special_tokens=False).input_ids
    return ids == Tokenizer.from_file(str(path)).encode(PROBE, add_special_tokens=False).ids
