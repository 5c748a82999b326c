"""Saves the trained student as a Hugging Face folder in the store: weights, config and tokenizer.

    receipt = save_model(store, run, student, progress, tokenizer_folder, ranks=2)

AutoModel, AutoTokenizer and pipeline("fill-mask") load the folder.
"""

import os
import platform
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from storage.artifact import Receipt
from storage.store import Store
from tasks.models.tokenizer import name_exact_class
from tasks.recipe.run_json import SCHEMA, RunSpec
from tasks.train.checkpoint import TrainingProgress

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def save_model(
    store: Store, run: RunSpec, student: PreTrainedModel, progress: TrainingProgress, tokenizer: Path, *, ranks: int
) -> Receipt:
    """Commits the model folder as the model artifact of the run.

    `student` contains the weights that train.result selects. `tokenizer` is the folder of the tokenizer that made the
    blocks, `ranks` the number of processes that trained. Rows, tokens and settings["steps"] of the receipt describe the
    complete training run; info["step"] is the step of the saved weights.
    """
    with store.scratch() as folder:
        student.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
        return store.commit(
            run.model_ref,
            folder,
            schema=SCHEMA,
            rows=progress.cursor,
            tokens=progress.tokens,
            settings={"steps": progress.step},
            parents=[run.run_key],
            info={
                "run_key": run.run_key,
                "layers": student.config.num_hidden_layers,
                "parameters": sum(p.numel() for p in student.parameters()),
                "teacher": run.teacher_fingerprint,
                "loss": run.loss.model_dump(),
                "positions": run.targets.positions,
                "source": run.targets.source,
                "encoding": run.targets.encoding,
                "result": run.train.result,
                "step": progress.best_step if run.train.result == "best" else progress.step,
                "best_heldout_loss": progress.best,  # the lowest of the run; of these weights if result is "best"
                "hardware": describe_hardware(student.device, ranks),
            },
        )


def describe_hardware(device: torch.device, ranks: int) -> str:
    """Returns the training hardware for the model card: `2 x NVIDIA H200`, or `CPU, 16 cores (x86_64)`."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    return f"CPU, {os.cpu_count() or 1} cores ({platform.machine()})"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer's files unchanged, since loading and saving them could change the tokenizer.

    Only the class name is replaced, and only if that class of transformers would read text differently.
    """
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    name_exact_class(folder)


def tokenizer_bytes(folder: Path) -> int:
    """Returns the total size of the files that `copy_tokenizer` copies."""
    return sum(path.stat().st_size for name in TOKENIZER_FILES if (path := folder / name).exists())
