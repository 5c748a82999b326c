"""train.result: the saved weights are those of the last step, or those of the lowest held-out loss."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import FatalError, RetryableError
from storage.garbage_collection import gc
from storage.store import Store
from tasks.recipe.run_json import RunSpec
from tasks.train import trainer
from tasks.train.checkpoint import checkpoint_ref, steps_kept, unfinished_checkpoints
from tasks.train.metrics import HeldoutLosses, read_metrics
from tasks.train.process import StopSignal
from tasks.train.step import Ranks
from tests.tasks.train.runs import finish, run_of, start, wait_for_step, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

BEST, STEPS = 4, 12
"""Step of the lowest held-out loss of `v_shaped_losses`, and the last step."""


def short_run(place: Path, home: Path, result: str, **changes: object) -> RunSpec:
    """Validates every 2 steps, saves a checkpoint every 3 and keeps two."""
    values = {"max_steps": STEPS, "validate_steps": 2, "checkpoint_steps": 3, "batch_rows": 2, "result": result}
    return run_of(place, home, **values | changes)  # type: ignore[arg-type]


def train_here(run: RunSpec, stop: StopSignal | None = None) -> bool:
    return trainer.train(run, Ranks(), stop or StopSignal())


def checkpoint_weights(run: RunSpec, step: int) -> dict[str, torch.Tensor]:
    store = Store(run.store)
    return load_file(store.verified_folder(store.receipt(checkpoint_ref(run, step))) / "model.safetensors")


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same bits; a model folder and a checkpoint may name a tied matrix differently."""
    shared = weights.keys() & others.keys()
    assert len(shared) >= len(others) - 1
    return all(torch.equal(weights[name], others[name]) for name in shared)


@pytest.fixture(autouse=True)
def v_shaped_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, the held-out loss falls until step BEST and rises after it."""
    should_validate = trainer.Trainer._should_validate
    at = 0

    def remember_step(self: trainer.Trainer, step: int, is_last: bool) -> bool:
        nonlocal at
        at = step
        return should_validate(self, step, is_last)

    monkeypatch.setattr(trainer.Trainer, "_should_validate", remember_step)
    monkeypatch.setattr(trainer, "heldout_loss", lambda *_: HeldoutLosses(1.0 + abs(at - BEST), 0.5))


def test_last_writes_no_checkpoint_for_the_lowest_loss(place: Path, tmp_path: Path) -> None:
    run, saved = short_run(place, tmp_path, "last"), []
    save = trainer.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", lambda *given: saved.append(given[-1].step) or save(*given))
        assert train_here(run)
    assert saved == [3, 6, 9, 12]
    assert steps_kept(Store(run.store), run) == [9, 12]
    info = Store(run.store).receipt(run.model_ref).info
    assert (info["result"], info["step"]) == ("last", STEPS)


def test_best_saves_the_weights_of_the_lowest_held_out_loss(place: Path, tmp_path: Path) -> None:
    run = short_run(place, tmp_path, "best")
    assert train_here(run)
    store = Store(run.store)
    assert steps_kept(store, run) == [BEST, 9, 12]
    assert same(weights_of(run), checkpoint_weights(run, BEST))
    assert not same(weights_of(run), checkpoint_weights(run, STEPS))
    receipt = store.receipt(run.model_ref)
    assert (receipt.info["result"], receipt.info["step"], receipt.settings["steps"]) == ("best", BEST, STEPS)
    assert receipt.info["best_heldout_loss"] == 1.0
    result = json.loads((Path(run.folder) / "result.json").read_text())
    assert (result["result"], result["step"], result["steps"]) == ("best", BEST, STEPS)


def test_the_best_checkpoint_survives_gc_and_resume(place: Path, tmp_path: Path) -> None:
    """The run is stopped after every step, and gc runs before it resumes."""
    run, store = short_run(place, tmp_path, "best"), Store(tmp_path / "store")

    stop = StopSignal(requested=True)
    for step in range(1, STEPS):
        assert not train_here(run, stop)
        assert steps_kept(store, run)[-1] == step
        keep = {("checkpoint", key) for key in unfinished_checkpoints(store)}
        gc(store, keep | {(ref.kind, ref.key) for ref in run.reads()}, delete=True, min_age=0)
        assert step < BEST or BEST in steps_kept(store, run)
    assert train_here(run)
    assert store.receipt(run.model_ref).info["step"] == BEST
    assert unfinished_checkpoints(store) == set(), "a finished run needs no checkpoint"


def test_a_damaged_best_checkpoint_is_trained_again(place: Path, tmp_path: Path) -> None:
    run, undamaged = short_run(place, tmp_path / "a", "best"), short_run(place, tmp_path / "b", "best")
    assert train_here(undamaged)
    store, save_result = Store(run.store), trainer._save_result

    def damage_then_save(*given: object) -> None:
        path = store.local_folder(store.receipt(checkpoint_ref(run, BEST))) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        save_result(*given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_save_result", damage_then_save)
        with pytest.raises(
            RetryableError, match=f"checkpoint of step {BEST}, .* is damaged and is now marked as missing"
        ):
            train_here(run)
    assert train_here(run)
    assert same(weights_of(run), weights_of(undamaged))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [({"heldout": False}, r"corpus\.heldout_per_mille"), ({"validate_steps": 0}, r"train\.validate_steps = 0")],
)
def test_best_without_validation_is_refused_before_the_first_step(
    place: Path, tmp_path: Path, changes: dict[str, object], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = short_run(place, tmp_path, "best", **changes)
    monkeypatch.delattr(trainer, "set_up_training")  # nothing is loaded
    with pytest.raises(FatalError, match=rf'train\.result = "best" .*{remedy}'):
        train_here(run)
    assert steps_kept(Store(run.store), run) == []


def test_best_without_a_finite_held_out_loss_is_an_error(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "heldout_loss", lambda *_: HeldoutLosses(float("nan"), 0.0))
    with pytest.raises(FatalError, match="no validation gave a finite held-out loss"):
        train_here(short_run(place, tmp_path, "best"))


def test_a_killed_run_ends_with_the_weights_of_its_lowest_loss(place: Path, tmp_path: Path) -> None:
    """With real held-out losses and a learning rate that makes them rise again."""
    run = run_of(place, tmp_path, result="best", validate_steps=3, checkpoint_steps=4, lr=0.02)
    process = start(run)
    wait_for_step(run, process, 17)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    weights = finish(run)
    lines = [line for line in read_metrics(Path(run.folder) / "metrics.jsonl") if "heldout_loss" in line]
    best = min(lines, key=lambda line: line["heldout_loss"])["step"]
    assert Store(run.store).receipt(run.model_ref).info["step"] == best
    assert same(weights, checkpoint_weights(run, best))


def test_gc_drops_checkpoints_of_an_older_run_schema(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = short_run(place, tmp_path, "last"), Store(tmp_path / "store")
    assert not train_here(run, StopSignal(requested=True))
    assert unfinished_checkpoints(store) == {checkpoint_ref(run, 1).key}
    monkeypatch.setattr("tasks.train.checkpoint.RUN_SCHEMA", 3)
    assert unfinished_checkpoints(store) == set()
