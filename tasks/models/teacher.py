"""The teacher, loaded checked and frozen.

    teacher = load_teacher(recipe.teacher)            # on the GPU if there is one

Called by tasks.teach, tasks.build and the trainer. Weights are safetensors, or .bin files read with weights_only; code
that comes with a model runs only if the recipe says teacher.trust_remote_code.
"""

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from storage.errors import FatalError
from tasks.models.files import folder_fingerprint, resolve_model, weight_files
from tasks.models.student import set_dropout
from tasks.recipe.config import Dtype, TeacherSettings
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits, load_vocabulary


@dataclass(frozen=True)
class TeacherModel:
    """A masked language model in evaluation mode, without gradients.

    `vocab_size` are the rows of its decoder; it may have a few more than its tokenizer has pieces. `width` is D.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    settings: TeacherSettings
    fingerprint: str
    width: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype


def load_teacher(teacher: TeacherSettings, device: str = "auto") -> TeacherModel:
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
    check_vocabulary_fits(vocabulary, vocab_size, teacher.model)
    return TeacherModel(
        model=model,
        vocabulary=vocabulary,
        settings=teacher,
        fingerprint=folder_fingerprint(folder, teacher),
        width=int(model.config.hidden_size),
        vocab_size=vocab_size,
        device=where,
        dtype=dtype,
    )


@lru_cache(maxsize=1)
def shared_teacher(teacher: TeacherSettings, device: str = "auto") -> TeacherModel:
    """One loaded teacher for all shards that a process works on. Never change the model that it holds."""
    return load_teacher(teacher, device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """A recipe's dtype, where auto means bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


# ---- loading -------------------------------------------------------------------------------------------------


def load_weights(
    teacher: TeacherSettings, folder: Path, dtype: torch.dtype, *, role: str = "teacher", dropout: float | None = None
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
