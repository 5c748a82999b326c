"""Training from cached targets matches training with the live teacher: equal loss curves, equal outputs per position.

Every test runs through real files: text shards, blocks, calibration, targets, RUN.json, the trainer.
The slow test uses the bundled demo teacher over 300 steps and prints its table (`pytest -m slow -s`).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForMaskedLM

from storage.artifact import Ref
from storage.store import Store
from tasks.models.model_files import fingerprint_of
from tasks.models.student import make_student
from tasks.models.teacher import load_teacher
from tasks.recipe.config import TargetSettings, TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import Part, make_run
from tasks.targets.compute import make_targets
from tasks.tokens.vocabulary import load_vocabulary
from tasks.train.metrics import read_metrics
from tasks.train.process import StopSignal
from tasks.train.step import Ranks
from tasks.train.trainer import train
from tests.benchmarks.encodings import CORPUS, TEACHER, blocks_of, capture_of, measure
from tests.harness.tiny import make_parts, make_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 20
PARTS = ("distil", "cosine", "mlm")
LIMITS = {"int8": 0.01, "bf16": 0.003}
"""Largest relative difference of distil and cosine in any window after the first."""
DRIFTS = 3
"""Alternative limit: this multiple of the drift of an online run whose student starts one ulp away."""


@dataclass(frozen=True)
class Bench:
    """A teacher, blocks in a store, and the training settings of one comparison."""

    store: Store
    home: Path
    teacher: Path
    parts: tuple[Part, ...]
    length: int
    rows: int
    steps: int

    def refs(self) -> list[Ref]:
        return [part.blocks_ref() for part in self.parts]


@pytest.fixture(scope="session")
def demo_teacher() -> Path:
    if not (TEACHER / "model.safetensors").exists():
        pytest.skip(f"the bundled teacher has no weights in {TEACHER}")
    return TEACHER


# ---- two students --------------------------------------------------------------------------------------------


def curves(bench: Bench, source: str, encoding: str = "int8", start: Path | None = None) -> NDArray[np.float64]:
    """Trains a student, from the model folder `start` if given; returns its losses [steps, 3], from metrics.jsonl."""
    parts = bench.parts if source == "online" else cached(bench, encoding)
    values = {
        "name": "parity",
        "home": str(bench.home),
        "store": bench.store.root,
        "corpus": {"url": "unused"},
        "blocks": {"length": bench.length},
        "teacher": {"model": str(bench.teacher), "dtype": "float32"},
        "targets": {"source": source, "encoding": encoding},
        "student": {"layers": 2},
        "train": {
            "batch_rows": bench.rows,
            "max_steps": bench.steps,
            "lr": 1e-3,
            "validate_steps": 0,
            "log_steps": 1,
            "device": "cpu",
            "warm_start": str(start) if start else "",
        },
    }
    recipe = make_recipe(values, "test")
    run = make_run(
        recipe,
        manifest=parts,
        heldout=(),
        teacher_fingerprint=fingerprint_of(recipe.teacher),
        start=fingerprint_of(TeacherSettings(model=str(start))) if start else "",
        counts="",
    )
    assert train(run, Ranks(), StopSignal())
    lines = read_metrics(Path(run.folder) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, bench.steps + 1))
    return np.array([[line[part] for part in PARTS] for line in lines])


def cached(bench: Bench, encoding: str) -> tuple[Part, ...]:
    """The same parts with targets in one encoding."""
    capture = capture_of(
        bench.store, bench.refs(), bench.teacher, TargetSettings.model_validate({"encoding": encoding})
    )
    keys = [make_targets(bench.store, ref, capture).key for ref in bench.refs()]
    return tuple(part.model_copy(update={"targets": (key,)}) for part, key in zip(bench.parts, keys, strict=True))


def save_student(bench: Bench, units: int) -> Path:
    """The initial student as a model folder, with one weight moved by `units` in the last place."""
    folder = bench.home / f"student-{units}"
    shutil.copytree(bench.teacher, folder)
    (folder / "model.safetensors").unlink()
    teacher = load_teacher(TeacherSettings(model=str(bench.teacher), dtype="float32"), "cpu")
    student = make_student(teacher.model, load_vocabulary(str(bench.teacher)), layers=2)
    weight = student.get_input_embeddings().weight.data[load_vocabulary(str(bench.teacher)).mask]
    for _ in range(units):
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    student.save_pretrained(folder)
    return folder


def differences(curve: NDArray[np.float64], live: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative difference [windows, 3] of the means of WINDOW steps, the first window left out."""
    means, wanted = (x.reshape(-1, WINDOW, len(PARTS)).mean(1)[1:] for x in (curve, live))
    return np.abs(means - wanted) / wanted


def compare(bench: Bench, encodings: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Differences of each encoding, and of "drift", from the online run."""
    live = curves(bench, "online")
    assert (live[-WINDOW:].mean(0) < live[:WINDOW].mean(0)).all(), (
        "the loss did not decrease, so the comparison means nothing"
    )
    assert np.array_equal(curves(bench, "online", start=save_student(bench, units=0)), live)
    drifted = curves(bench, "online", start=save_student(bench, units=1))
    assert not np.array_equal(drifted, live)
    found = {name: differences(curves(bench, "cached", name), live) for name in encodings}
    return found | {"drift": differences(drifted, live)}


def check(found: dict[str, NDArray[np.float64]]) -> None:
    """distil and cosine of every window are within the limit of the encoding, or within the drift of that window."""
    for name, limit in LIMITS.items():
        allowed = np.maximum(limit, DRIFTS * found["drift"][:, :2])
        wrong = found[name][:, :2] > allowed
        assert not wrong.any(), f"{name}: windows x (distil, cosine) {np.argwhere(wrong).tolist()}\n{table(found)}"


def table(found: dict[str, NDArray[np.float64]]) -> str:
    """Maximum and mean difference of each loss over the windows; 1e-2 is one percent."""
    lines = [f"{'':6}" + "".join(f"{part + ' max':>12}{'mean':>10}" for part in PARTS)]
    for name, values in found.items():
        cells = "".join(f"{m:12.1e}{a:10.1e}" for m, a in zip(values.max(0), values.mean(0), strict=True))
        lines.append(f"{name:6}{cells}")
    return "\n".join(lines)


def test_a_tiny_student_has_the_same_loss_curves_from_the_cache(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    store = Store(tmp_path / "store")
    parts = make_parts(store, tmp_path / "teacher", shards=2)
    bench = Bench(store, tmp_path, tmp_path / "teacher", parts, length=32, rows=8, steps=60)
    check(compare(bench, ("int8", "bf16")))


@pytest.mark.slow
def test_a_demo_student_has_the_same_loss_curves_from_the_cache(tmp_path: Path, demo_teacher: Path) -> None:
    """300 steps of 8 blocks of 64 of the demo corpus. int4 is for information only."""
    store = Store(tmp_path / "store")
    made = blocks_of(store, CORPUS, demo_teacher, length=64, shard_bytes=200_000, shards=4)
    parts = tuple(Part(label=one.label, blocks=one.key, rows=one.rows, tokens=one.tokens) for one in made)
    assert sum(part.rows for part in parts) >= 300 * 8
    bench = Bench(store, tmp_path, demo_teacher, parts, length=64, rows=8, steps=300)
    found = compare(bench, ("int8", "bf16", "int4"))
    print("\n" + table(found))
    check(found)


# ---- outputs per position -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_blocks(tmp_path_factory: pytest.TempPathFactory, demo_teacher: Path) -> tuple[Store, list[Ref]]:
    """About 300 blocks of the demo corpus, 6,000 masked positions."""
    store = Store(tmp_path_factory.mktemp("parity") / "store")
    made = blocks_of(store, CORPUS, demo_teacher, length=128, shard_bytes=60_000, shards=3)
    return store, [receipt.ref for receipt in made]


def test_int8_matches_the_demo_teacher(demo_blocks: tuple[Store, list[Ref]], demo_teacher: Path) -> None:
    (found,) = measure(*demo_blocks, demo_teacher, ["int8"])
    assert found.positions > 3000
    assert found.kl <= 1e-4
    assert found.cosine is not None
    assert found.cosine <= 1e-4
    assert found.stored_bytes < 1.05 * (192 + 2)


def test_int8_tolerates_two_outlier_channels(
    demo_blocks: tuple[Store, list[Ref]], demo_teacher: Path, tmp_path: Path
) -> None:
    """The final norm's output is multiplied by 50 in two channels and the LM head's weights divided by 50 there."""
    outliers = shutil.copytree(demo_teacher, tmp_path / "outliers")
    model = AutoModelForMaskedLM.from_pretrained(demo_teacher)
    sentence = torch.arange(20, 60)[None]
    with torch.no_grad():
        before, hidden = model(sentence).logits, model.base_model(sentence).last_hidden_state
        channels = [3, 100]
        model.model.final_norm.weight[channels] *= 50
        model.head.dense.weight[:, channels] /= 50
        after, outlier_hidden = model(sentence).logits, model.base_model(sentence).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outlier_hidden[..., channels], 50 * hidden[..., channels])
    model.save_pretrained(outliers)
    (found,) = measure(*demo_blocks, outliers, ["int8"])
    assert found.kl <= 1e-4
    assert found.cosine is not None
    assert found.cosine <= 1e-4
