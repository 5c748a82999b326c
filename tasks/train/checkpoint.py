"""Saves and loads checkpoints: model, optimizer, training progress and resolved settings as one artifact of the store.

    progress = load_checkpoint(store, run, model, optimizer)         # the newest one; TrainingProgress() if none exists
    save_checkpoint(store, run, model, optimizer, progress)          # then deletes those that are no longer kept

A checkpoint's key consists of the run key and the step, so one listing finds the newest. The newest
train.keep_checkpoints checkpoints are kept and, with train.result = "best", those with the lowest held-out loss. The
state of random number generators is not saved: each step seeds them from (train.seed, step, rank).
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage.artifact import Receipt, Ref
from storage.errors import DamagedError, FatalError, RetryableError
from storage.store import Store
from tasks.recipe.run_json import RUN_SCHEMA, SCHEMA, RunSpec, model_ref

_KEY = re.compile(r"(?P<run>[0-9a-f]{64})-(?P<step>[0-9]{9})")


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run.

    `step`: optimizer steps done. `cursor`: blocks consumed by all ranks. `tokens`: tokens read. `best`: the lowest
    held-out loss so far, None before the first validation. `best_step`: the step of `best`.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int = 0


def checkpoint_ref(run: RunSpec, step: int) -> Ref:
    """Returns the reference of the checkpoint of a run at a step."""
    return Ref("checkpoint", f"{run.run_key}-{step:09d}", f"{run.name} step {step}")


def steps_kept(store: Store, run: RunSpec) -> list[int]:
    """Returns the steps at which this run has a checkpoint, ascending."""
    found = (_KEY.fullmatch(key) for key in store.keys("checkpoint"))
    return sorted(int(match["step"]) for match in found if match and match["run"] == run.run_key)


def unfinished_checkpoints(store: Store) -> set[str]:
    """Returns the keys of all checkpoints that a run may still resume from; `gc` keeps them.

    The run has no model yet, and its run key has the current schema.
    """
    models = store.keys("model")
    found = (_KEY.fullmatch(key) for key in store.keys("checkpoint"))
    unfinished = [
        Ref("checkpoint", match[0], match[0][:12])
        for match in found
        if match and model_ref(match["run"], "").key not in models
    ]
    return {ref.key for ref in unfinished if _has_current_run_schema(store, ref)}


def _has_current_run_schema(store: Store, ref: Ref) -> bool:
    """Returns False for a checkpoint of an older run schema, from which no run of this version resumes. True if
    unknown."""
    receipt = _receipt_unless_damaged(store, ref)
    return receipt is None or receipt.info.get("run_schema", 1) == RUN_SCHEMA


def save_checkpoint(
    store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer, progress: TrainingProgress
) -> Receipt:
    """Commits the checkpoint of this step, then deletes the checkpoints that are no longer kept."""
    with store.scratch() as folder:
        save_file(model_tensors(model), folder / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
        (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        (folder / "run.json").write_text(run.model_dump_json(indent=1), encoding="utf-8")
        receipt = store.commit(
            checkpoint_ref(run, progress.step),
            folder,
            schema=SCHEMA,
            rows=progress.cursor,
            tokens=progress.tokens,
            settings={"step": progress.step},
            parents=[run.run_key],
            info={"run_schema": RUN_SCHEMA, "best_step": progress.best_step},
        )
    _drop_old(store, run)
    return receipt


def load_checkpoint(store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Restores the newest intact checkpoint. If none exists, returns TrainingProgress() and changes nothing.

    A damaged checkpoint is withdrawn, and the previous one is used. With train.result = "best", a checkpoint whose best
    checkpoint is lost is deleted: a run that resumed from it could not save the best weights.

    FatalError, RetryableError: a checkpoint cannot be read, for example because the cache is full or access is denied.
    The run ends, since its checkpoints may be intact, and a start from step 0 would discard them.
    """
    for step in reversed(steps_kept(store, run)):
        ref = checkpoint_ref(run, step)
        try:
            receipt = store.find_receipt(ref)
            if receipt is None:  # deleted since the listing
                continue
            if run.train.result == "best" and not _best_is_intact(store, run, receipt):
                delete_checkpoint(store, ref)
                continue
            return _restore(store, receipt, model, optimizer)
        except DamagedError as error:
            store.withdraw(ref)
            store.fail(ref, error)
    return TrainingProgress()


def load_step(
    store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TrainingProgress:
    """Restores the checkpoint of this step. Step 0 has none and changes nothing. FatalError: it is missing or
    damaged."""
    if step == 0:
        return TrainingProgress()
    return _restore(store, store.receipt(checkpoint_ref(run, step)), model, optimizer)


def load_best_weights(store: Store, run: RunSpec, model: nn.Module, progress: TrainingProgress) -> None:
    """Replaces the weights of the model with those of the lowest held-out loss.

    FatalError: no validation gave a finite loss. RetryableError: the checkpoint is damaged; it is withdrawn, so that
    the run trains those steps again.
    """
    if progress.best is None:
        raise FatalError(
            f"run {run.name}: no validation gave a finite held-out loss, so no best checkpoint exists; "
            'lower train.lr, or set train.result = "last"'
        )
    ref = checkpoint_ref(run, progress.best_step)
    try:
        _load_weights(store.verified_folder(store.receipt(ref)), model)
    except DamagedError as error:
        store.withdraw(ref)
        store.fail(ref, error)
        raise RetryableError(
            f"run {run.name}: the checkpoint of step {progress.best_step}, which has the lowest held-out loss, is "
            f"damaged and is now marked as missing; start the run again to repeat the lost steps ({error})"
        ) from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters by name, on the CPU. Tied parameters occur once."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def delete_checkpoint(store: Store, ref: Ref) -> None:
    """Withdraws a checkpoint and deletes its data.

    If the receipt is damaged, the data cannot be found from it; `gc` deletes the data later.
    """
    receipt = _receipt_unless_damaged(store, ref)
    store.withdraw(ref)
    if receipt is not None:
        store.drop_data(receipt)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{field}/{names[id(parameter)]}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
        if isinstance(value, Tensor)
    }


def _restore(store: Store, receipt: Receipt, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Verifies a checkpoint's hashes, then loads it into model and optimizer."""
    folder = store.verified_folder(receipt)
    parameters = _load_weights(folder, model)
    for name, value in load_file(folder / "optimizer.safetensors").items():
        field, parameter_name = name.split("/", 1)
        parameter = parameters[parameter_name]
        # Fused AdamW keeps its step counter on the parameter's device.
        optimizer.state[parameter][field] = value.to(parameter.device)
    values: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return TrainingProgress(**values)


def _load_weights(folder: Path, model: nn.Module) -> dict[str, nn.Parameter]:
    """Copies the weights into the model and returns its parameters by name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / "model.safetensors").items():
            parameters[name].copy_(value)
    return parameters


def _drop_old(store: Store, run: RunSpec) -> None:
    """Deletes all checkpoints except the newest ones and, with train.result = "best", the best checkpoint of each of
    these.

    A run may resume from any of the newest checkpoints, and may then have to save the weights of its best checkpoint.
    """
    steps = steps_kept(store, run)
    keep = set(steps[-run.train.keep_checkpoints :])
    if run.train.result == "best":
        newest = [_receipt_unless_damaged(store, checkpoint_ref(run, step)) for step in sorted(keep)]
        keep |= {receipt.info["best_step"] for receipt in newest if receipt is not None}
    for step in steps:
        if step not in keep:
            delete_checkpoint(store, checkpoint_ref(run, step))


def _best_is_intact(store: Store, run: RunSpec, receipt: Receipt) -> bool:
    """Returns whether the best checkpoint that this one refers to can be loaded. Withdraws it if it is damaged."""
    step = receipt.info["best_step"]
    if step in (0, receipt.settings["step"]):  # not validated yet, or this one, which is verified when it is loaded
        return True
    ref = checkpoint_ref(run, step)
    try:
        best = store.find_receipt(ref)
        if best is not None:
            store.verified_folder(best)
    except DamagedError as error:
        store.withdraw(ref)
        store.fail(ref, error)
        return False
    return best is not None


def _receipt_unless_damaged(store: Store, ref: Ref) -> Receipt | None:
    try:
        return store.find_receipt(ref)
    except DamagedError:
        return None
