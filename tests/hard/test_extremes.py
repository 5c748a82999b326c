"""Runs extreme sizes and values through blocks, targets and two training steps: the result is right, or an error clear.

Extremes of a single package are in its own tests: NaN in one row of a teacher's output (targets/test_compute.py),
temperatures and weights of the loss (test_loss.py), token ids above 65,535 (test_blocks.py, test_codec.py).
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from storage.errors import FatalError
from storage.store import Store
from tasks.models.model_files import fingerprint_of
from tasks.models.teacher import load_teacher
from tasks.recipe.run_json import Part, RunSpec, make_run
from tasks.targets.calibration import calibrate, read_calibration
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets
from tasks.targets.targets_file import open_targets
from tasks.tokens.blocks import make_blocks, open_blocks
from tasks.train.metrics import read_metrics
from tasks.train.process import StopSignal
from tasks.train.step import Ranks
from tasks.train.trainer import train
from tests.harness.recipe_values import simple_recipe
from tests.harness.tiny import documents, make_teacher, save_text_shard

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extremes") / "teacher"
    make_teacher(folder, layers=2, width=16)
    return folder


def run_of(place: Path, teacher: Path, texts: list[str], length: int = 32, **sections: Any) -> RunSpec:
    """Makes one shard of these texts with its targets. Returns a training run of two steps over it."""
    values = {
        "name": "extreme",
        "home": str(place),
        "store": str(place / "store"),
        "teacher": {"model": str(teacher)},
        "blocks": {"length": length},
        "targets": {"calibration_rows": 8},
        "student": {"layers": 1},
        "train": {
            "max_steps": STEPS,
            "batch_rows": 2,
            "log_steps": 1,
            "validate_steps": 0,
            "device": "cpu",
            "threads": 1,
        },
    }
    recipe = simple_recipe(**values | sections)
    store, model = Store(recipe.store), load_teacher(recipe.teacher, "cpu")
    shard = save_text_shard(store, texts, "part-0000")
    blocks = make_blocks(store, shard, recipe.blocks, model.vocabulary)
    bare = Capture(model, model.vocabulary, recipe.mask, recipe.targets)
    found = calibrate(store, [blocks.ref], bare)
    capture = replace(bare, calibration=read_calibration(store, found.ref), calibration_key=found.key)
    targets = make_targets(store, blocks.ref, capture)
    part = Part(label="part-0000", blocks=blocks.key, targets=(targets.key,), rows=blocks.rows, tokens=blocks.tokens)
    fingerprint = fingerprint_of(recipe.teacher)
    return make_run(recipe, manifest=(part,), heldout=(), teacher_fingerprint=fingerprint, start="", counts="")


def losses(run: RunSpec) -> list[dict[str, float]]:
    """Trains to the end, checks that all metrics are finite, and returns the lines of metrics."""
    assert train(run, Ranks(), StopSignal())
    lines = [line for line in read_metrics(Path(run.folder) / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert all(math.isfinite(line[name]) for name in ("loss", "distil", "cosine", "mlm", "grad_norm")), line
    return lines


def test_a_shard_of_one_block(tmp_path: Path, teacher: Path) -> None:
    run = run_of(tmp_path, teacher, ["Le chat regarde la maison."])
    assert run.manifest[0].rows == 1
    assert all(line["loss"] > 0 for line in losses(run))


def test_documents_of_one_token_or_of_none(tmp_path: Path, teacher: Path) -> None:
    run = run_of(tmp_path, teacher, ["a", "b", ""], blocks={"length": 32, "packing": "documents"})
    store = Store(run.store)
    blocks = open_blocks(store, run.manifest[0].blocks_ref())
    counts = open_targets(store, run.manifest[0].targets_ref(0)).counts
    assert (blocks.lengths <= 2 + 2 * 3).all(), "a block contains more than two documents of two tokens and their ends"
    assert len(counts) == len(blocks)
    losses(run)


@pytest.mark.parametrize("length", [8, 128, 2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_block_lengths(length: int, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    model = make_teacher(folder, family="modernbert", layers=2, width=16)
    model.config.max_position_embeddings = length
    model.save_pretrained(folder)
    texts = documents(2 * length // 8 + 2)
    run = run_of(tmp_path, folder, texts, length, train=SHORT)
    assert open_blocks(Store(run.store), run.manifest[0].blocks_ref()).input_ids.shape[1] == length
    assert all(line["loss"] > 0 for line in losses(run))


SHORT = {"max_steps": STEPS, "batch_rows": 1, "log_steps": 1, "validate_steps": 0, "device": "cpu", "threads": 1}


def test_blocks_longer_than_the_teacher_reads_are_refused(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(FatalError, match=r"blocks\.length = 512"):
        run_of(tmp_path, teacher, documents(40), 512)


def test_a_teacher_that_says_the_same_of_everything(tmp_path: Path) -> None:
    """The teacher has equal logits everywhere, so its softened distribution is uniform."""
    folder = tmp_path / "teacher"
    make_teacher(folder, layers=2, width=16)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().bias.fill_(3.0)
    model.save_pretrained(folder)
    for line in losses(run_of(tmp_path, folder, documents(20))):
        assert 0 <= line["distil"] < 1


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0, 0.5)])
@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_weights_of_zero_and_far_temperatures(
    weights: tuple[float, float, float], temperature: float, tmp_path: Path, teacher: Path
) -> None:
    loss = dict(zip(("distil", "cosine", "mlm"), weights, strict=True)) | {"temperature": temperature}
    for line in losses(run_of(tmp_path, teacher, documents(20), loss=loss)):
        parts = {name: line[name] for name in ("distil", "cosine", "mlm")}
        assert {name for name, value in parts.items() if value > 0} == {name for name in parts if loss[name]}
        assert line["loss"] == pytest.approx(sum(loss[name] * parts[name] for name in parts), rel=1e-4)
