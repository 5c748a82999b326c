"""Loads a masked language model with its tokenizer for evaluation.

    models = {"student": load_model(folder), "teacher": load_model(other_folder)}
    with eval_mode(models["student"].model):
        ...

Folders have the Hugging Face layout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from storage.errors import FatalError
from tasks.models.tokenizer import exact_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A masked language model, its tokenizer, and the folder that both were loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Loads a folder in the Hugging Face layout, in float32 and in evaluation mode.

    FatalError if the folder contains no masked language model, no tokenizer, or a tokenizer without a mask token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FatalError(f"{folder}: no such model folder; use the folder of a saved model", str(folder))
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with silenced():
            model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = exact_tokenizer(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        message = f"{folder} has no masked language model with its tokenizer ({first_line}); use a saved model's folder"
        raise FatalError(message, str(folder)) from error
    if tokenizer.mask_token_id is None:
        raise FatalError(f"{folder}: the tokenizer has no mask token; use a masked language model", str(folder))
    return LoadedModel(model.to(device).eval(), tokenizer, folder)


@contextmanager
def silenced() -> Iterator[None]:
    """Disables the progress bars of transformers and its warnings about new or unused heads, which are expected."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def eval_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Switches the models to evaluation mode (no dropout) inside the block and restores the mode of each afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, before, strict=True):
            model.train(was_training)
