"""Tiny training runs for tests, and the trainer as a process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from storage.store import Store
from tasks.models.model_files import fingerprint_of
from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import RunSpec, make_run, write_run
from tasks.train.metrics import read_metrics
from tests.harness.recipe_values import TINY
from tests.harness.tiny import make_parts

REPO = Path(__file__).resolve().parents[3]
STEPS = 30


def recipe_of(place: Path, home: Path, **train: object) -> Recipe:
    values = {
        "name": "tiny",
        "home": str(home),
        "store": str(home / "store"),
        "corpus": {"url": "unused"},
        "teacher": {"model": str(place / "teacher")},
        "blocks": {"length": 32},
        "targets": {"source": "online"},
        "student": {"layers": 2, "dropout": 0.1},
        "train": TINY["train"] | {"max_steps": STEPS} | train,
    }
    return make_recipe(values, "test")


def run_of(place: Path, home: Path, *, heldout: bool = True, **train: object) -> RunSpec:
    """A run over copies of the prepared blocks, in its own home: two shards to train on and one held out."""
    recipe = recipe_of(place, home, **train)
    parts = make_parts(Store(recipe.store), place / "teacher", shards=3)
    return make_run(
        recipe,
        manifest=parts[:2],
        heldout=parts[2:] if heldout else (),
        teacher_fingerprint=fingerprint_of(recipe.teacher),
        start="",
        counts="",
    )


def start(run: RunSpec, ranks: int = 1, trainer: str = "tasks.train") -> subprocess.Popen[str]:
    """Starts the trainer, or a program of this folder, as a process; under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", trainer, str(write_run(run))]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=run.folder)


def finish(run: RunSpec, ranks: int = 1, trainer: str = "tasks.train") -> dict[str, torch.Tensor]:
    """Trains to the end; returns the weights of the model."""
    process = start(run, ranks, trainer)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return weights_of(run)


def weights_of(run: RunSpec) -> dict[str, torch.Tensor]:
    store = Store(run.store)
    return load_file(store.verified_folder(store.receipt(run.model_ref)) / "model.safetensors")


def wait_for_step(run: RunSpec, process: subprocess.Popen[str], step: int) -> None:
    """Returns when metrics.jsonl has reached a step, or the process has ended."""
    path = Path(run.folder) / "metrics.jsonl"
    while process.poll() is None:
        lines = read_metrics(path)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.002)
