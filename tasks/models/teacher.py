"""Loads the teacher: a validated masked language model in evaluation mode, with frozen weights.

    teacher = load_teacher(recipe.teacher)            # on the GPU, if the machine has one

Weights are read from safetensors files, or from .bin files with weights_only. Code in a model folder runs only if
teacher.trust_remote_code is true.
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
from tasks.models.model_files import folder_fingerprint, resolve_model, weight_files
from tasks.models.student import set_dropout
from tasks.recipe.config import Dtype, TeacherSettings
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits, load_vocabulary


@dataclass(frozen=True)
class TeacherModel:
    """A masked language model in evaluation mode, without gradients.

    `width`: hidden size D. `vocab_size`: rows V of the decoder, which may exceed the size of the tokenizer by some
    padding.
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
    """Loads the teacher onto `device`: auto, cpu or cuda.

    FatalError: weights are missing, damaged or incomplete, the tokenizer does not fit, or the device does not exist.
    RetryableError: the hub does not respond.
    """
    where = _device(device)
    dtype = resolve_dtype(teacher.dtype, where)
    folder = resolve_model(teacher.model, teacher.revision)
    vocabulary = load_vocabulary(teacher.model, teacher.revision, teacher.trust_remote_code)
    # Any: the types of transformers depend on which optional packages are installed.
    model: Any = load_weights(teacher, folder, dtype)
    model.eval().requires_grad_(False).to(where)
    decoder = model.get_output_embeddings()
    if decoder is None:
        raise FatalError(f"teacher {teacher.model} has no LM head; use a masked language model", teacher.model)
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
    """Loads the teacher once per process, for all of its shards. Callers must not modify the model."""
    return load_teacher(teacher, device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Returns the torch dtype of a recipe's dtype; auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


# ---- loading -------------------------------------------------------------------------------------------------


def load_weights(
    teacher: TeacherSettings, folder: Path, dtype: torch.dtype, *, role: str = "teacher", dropout: float | None = None
) -> PreTrainedModel:
    """Loads a masked language model with all of its weights; `dropout` overrides the dropout of its config.

    FatalError: the weights are damaged, incomplete or of a different architecture; `role` names the model in the
    message.
    """
    first = weight_files(folder, teacher.model)[0]
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=teacher.trust_remote_code, local_files_only=True)
        if dropout is not None:
            set_dropout(config, dropout)
        model, loading = AutoModelForMaskedLM.from_pretrained(
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
            "copy the model again or use a different one",
            str(first),
        ) from error
    if loading["missing_keys"]:
        raise FatalError(
            f"{role} {teacher.model}: the weights of {sorted(loading['missing_keys'])[0]} are missing and would be "
            "random; save the model as AutoModelForMaskedLM, LM head included",
            str(first),
        )
    result: PreTrainedModel = model
    return result


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FatalError('this machine has no GPU; set train.device = "auto" or "cpu"')
    return torch.device(name)
