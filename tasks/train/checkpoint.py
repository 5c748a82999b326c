"""Checkpoints: model, optimizer, cursor and resolved settings, committed to the store whole or not at all.

A checkpoint's key is the run key and the step, so the newest one is found by one listing. The last k and the best
are kept. Random numbers need no state: each step seeds them from (train.seed, step, rank).
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
from storage.errors import DamagedError
from storage.store import Store
from tasks.recipe.run_spec import SCHEMA, RunSpec, model_ref

_KEY = re.compile(r"(?P<run>[0-9a-f]{64})-(?P<step>[0-9]{9})")


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands: optimizer steps done, global rows consumed, tokens seen, best held-out loss and its step."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int = 0


def checkpoint_ref(run: RunSpec, step: int) -> Ref:
    """Names the checkpoint of a run at a step."""
    return Ref("checkpoint", f"{run.run_key}-{step:09d}", f"{run.name} step {step}")


def steps_kept(store: Store, run: RunSpec) -> list[int]:
    """Steps of this run that have a checkpoint, ascending."""
    found = (_KEY.fullmatch(key) for key in store.keys("checkpoint"))
    return sorted(int(match["step"]) for match in found if match and match["run"] == run.run_key)


def unfinished_checkpoints(store: Store) -> set[str]:
    """Keys of all checkpoints whose training has not ended in a model: with those it goes on."""
    models = store.keys("model")
    found = (_KEY.fullmatch(key) for key in store.keys("checkpoint"))
    return {match[0] for match in found if match and model_ref(match["run"], "").key not in models}


def save_checkpoint(
    store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer, progress: TrainingProgress
) -> Receipt:
    """Commits the checkpoint of this step, then drops what is no longer kept."""
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
        )
    _drop_old(store, run, progress)
    return receipt


def load_checkpoint(store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Restores the newest whole checkpoint; a damaged one is passed over for the one before. Progress() if none.

    FatalError, RetryableError: one cannot be read, since the cache is full or access is refused, say. That ends the
    run: its checkpoints are good, and to begin without them would throw the work away.
    """
    for step in reversed(steps_kept(store, run)):
        ref = checkpoint_ref(run, step)
        try:
            receipt = store.receipt_if_there(ref)
            if receipt is not None:  # not gone since the listing
                return _restored(store, receipt, model, optimizer)
        except DamagedError as error:
            store.withdraw(ref)
            store.fail(ref, error)
    return TrainingProgress()


def load_step(
    store: Store, run: RunSpec, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TrainingProgress:
    """Restores the checkpoint of this step; of step 0 there is none, and nothing to do. FatalError: it is not whole."""
    if step == 0:
        return TrainingProgress()
    return _restored(store, store.receipt(checkpoint_ref(run, step)), model, optimizer)


def _restored(store: Store, receipt: Receipt, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Puts a checkpoint, hashed, into model and optimizer."""
    folder = store.check(receipt)
    _restore(folder, model, optimizer)
    values: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return TrainingProgress(**values)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{field}/{names[id(parameter)]}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
        if isinstance(value, Tensor)
    }


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / "model.safetensors").items():
            parameters[name].copy_(value)
    for name, value in load_file(folder / "optimizer.safetensors").items():
        field, parameter_name = name.split("/", 1)
        parameter = parameters[parameter_name]
        # The fused AdamW keeps its step counter beside the parameter.
        optimizer.state[parameter][field] = value.to(parameter.device)


def _drop_old(store: Store, run: RunSpec, progress: TrainingProgress) -> None:
    steps = steps_kept(store, run)
    keep = set(steps[-run.train.keep_checkpoints :]) | {progress.best_step}
    for step in steps:
        if step not in keep:
            delete_checkpoint(store, checkpoint_ref(run, step))


def delete_checkpoint(store: Store, ref: Ref) -> None:
    """Withdraws a checkpoint and deletes its data; `gc` does that where the receipt is damaged and names none."""
    try:
        receipt = store.receipt_if_there(ref)
    except DamagedError:
        receipt = None
    store.withdraw(ref)
    if receipt is not None:
        store.drop_data(receipt)
