"""How fast this machine is: imports, and on the device at hand the real capture and the real trainer on a few blocks.

    pace = measure(Store(folder), recipe, sample.blocks, seconds=10)      # in a scratch store

Called by `distil plan`. Shapes are those of the recipe where `seconds` allow it; on a slow device fewer blocks are
timed, and their time multiplied. Of several times the shortest counts: what others do on the machine meanwhile is no
cost of the recipe, and cannot be foretold.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from storage.arrow import ArrowWriter, metadata_of, open_arrow
from storage.artifact import Receipt, Ref
from storage.errors import FatalError
from storage.fingerprint import key_of
from storage.store import Store
from tasks.lineage import caches_targets, teacher_key, vocabulary_of
from tasks.recipe.config import Recipe, S
from tasks.recipe.run_spec import METRICS, Part, make_run
from tasks.targets.calibration import calibrate
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets, open_capture
from tasks.targets.keys import needs_calibration
from tasks.tokens.blocks import count_tokens
from tasks.train.checkpoint import TrainingProgress, save_checkpoint
from tasks.train.export import describe_hardware
from tasks.train.metrics import read_metrics
from tasks.train.optimizer import make_optimizer
from tasks.train.process import StopSignal, keep_freed_memory, pick_device
from tasks.train.setup import set_up_training
from tasks.train.step import Ranks
from tasks.train.trainer import Trainer

WARM, TIMED = 3, 5
"""Steps that are not timed (memory is found, kernels are compiled), and steps that are."""

FIRST_TOKENS = 2048
"""Tokens of the first look at the teacher's speed, which the channels are calibrated on too."""

A_STEP = 1.5
"""A step on a block takes about so many of the teacher's forwards; only to choose how many blocks are timed."""


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, and seconds that importing the trainer takes in a new process."""

    cores: int
    import_seconds: float


@dataclass(frozen=True)
class Timings:
    """Seconds on one device; 0 without a teacher where they are the teacher's.

    `load`: the teacher into memory. `capture`: one block under one mask, encoded and written. `step`: one optimizer
    step of the whole batch, of which `rows` blocks were timed. `start`: building the student, and what the first steps
    take longer. `save`: one checkpoint.
    """

    device: str
    rows: int
    load: float
    capture: float
    step: float
    start: float
    save: float


def describe_machine() -> Machine:
    """Imports the trainer in a new process and looks at the clock."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tasks.train.trainer"], check=True)
    return Machine(len(os.sched_getaffinity(0)), time.perf_counter() - started)


def measure(store: Store, recipe: Recipe, blocks: Sequence[Ref], seconds: float, *, training: bool = True) -> Timings:
    """Times teacher and student on the largest of these blocks; each takes some `seconds`, or twice that. Without
    `training` the student is left out, and the teacher too where nothing is cached.

    FatalError: a teacher or student that cannot be used, or no blocks.
    """
    if not training and not caches_targets(recipe):
        return Timings("", 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    largest = max((store.receipt(ref) for ref in blocks), key=lambda receipt: receipt.rows, default=None)
    if largest is None or not largest.rows:
        raise FatalError(f"recipe {recipe.name}: the sample of {recipe.corpus.url} holds no text; is corpus.url right?")
    changes = {"store": store.root, "home": f"{store.root}/home", "mask": _changed(recipe.mask, variants=1)}
    recipe = recipe.model_copy(update=changes)
    counts = count_tokens(store, [largest.ref], vocabulary_of(recipe)).ref if recipe.mask.kind == "smoothed" else None
    if recipe.loss.needs_teacher:
        taught = _time_teacher(store, recipe, largest, counts, seconds)
    else:
        some = _first(store, largest, recipe.train.batch_rows)
        taught = _TaughtSample(_part(some, ()), 0.0, 0.0, seconds / recipe.train.batch_rows / (WARM + TIMED))
    if not training:
        return Timings("", 0, taught.load, taught.capture, 0.0, 0.0, 0.0)
    return _time_student(store, recipe, taught, counts, seconds)


class _TaughtSample(NamedTuple):
    """Blocks with their targets; seconds to load the teacher, of a block, and what a step may take a block."""

    part: Part
    load: float
    capture: float
    rough_step: float


def _time_teacher(store: Store, recipe: Recipe, blocks: Receipt, counts: Ref | None, seconds: float) -> _TaughtSample:
    few = _first(store, blocks, max(1, FIRST_TOKENS // recipe.blocks.length))
    started = time.perf_counter()
    capture = _open(store, recipe, counts, None)
    load = time.perf_counter() - started
    for force in (False, True):  # the first time finds memory and loads kernels
        calibration = calibrate(store, [few.ref], capture, force=force)
    rough = max(calibration.timings["seconds"], 1e-3) / few.rows
    some = _first(store, blocks, max(few.rows, int(seconds / rough)))
    capture = _open(store, recipe, counts, calibration.ref if needs_calibration(recipe.targets) else None)
    for force in (False, True):
        targets = make_targets(store, some.ref, capture, force=force)
    probed = targets.info["probe"]["rows"]
    return _TaughtSample(
        _part(some, (targets.key,)), load, targets.timings["seconds"] / (some.rows + probed), A_STEP * rough
    )


def _open(store: Store, recipe: Recipe, counts: Ref | None, calibration: Ref | None) -> Capture:
    vocabulary, device = vocabulary_of(recipe), recipe.train.device
    return open_capture(store, recipe.teacher, vocabulary, recipe.mask, recipe.targets, counts, calibration, device)


def _time_student(store: Store, recipe: Recipe, taught: _TaughtSample, counts: Ref | None, seconds: float) -> Timings:
    """Runs the trainer for a few steps, of the whole batch of one rank or of as much as there is time for."""
    whole = -(-recipe.train.batch_rows // recipe.train.ranks)
    rows = max(1, min(whole, int(seconds / (WARM + TIMED) / taught.rough_step)))
    train = _changed(
        recipe.train, batch_rows=rows, max_steps=WARM + TIMED, log_steps=1, validate_steps=0, checkpoint_steps=10**9
    )
    run = make_run(
        recipe.model_copy(update={"train": train}),
        manifest=(taught.part,),
        heldout=(),
        teacher_fingerprint=teacher_key(recipe),
        start="",
        counts=counts.key if counts else "",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(train.threads or threads)
    keep_freed_memory()  # as a trainer does; for good, so what else is timed comes before
    started = time.perf_counter()
    built = set_up_training(run, store, pick_device(run))
    optimizer = make_optimizer(built.student, train)
    trainer = Trainer(run, store, built, optimizer, Ranks(), None, pick_device(run))
    progress = trainer.loop(TrainingProgress(), StopSignal())
    looped = time.perf_counter() - started
    step = min(line["seconds"] for line in read_metrics(Path(run.folder) / METRICS)[WARM:])
    started = time.perf_counter()
    save_checkpoint(store, run, built.student, optimizer, progress)
    saved = time.perf_counter() - started
    torch.set_num_threads(threads)
    return Timings(
        device=describe_hardware(trainer.device, train.ranks),
        rows=rows,
        load=taught.load,
        capture=taught.capture,
        step=step * whole / rows,
        start=max(0.0, looped - (WARM + TIMED) * step),
        save=saved,
    )


def _part(blocks: Receipt, targets: tuple[str, ...]) -> Part:
    return Part(label=blocks.label, blocks=blocks.key, targets=targets, rows=blocks.rows, tokens=blocks.tokens)


def _changed(section: S, **changes: object) -> S:
    return section.model_copy(update=changes)


def _first(store: Store, blocks: Receipt, rows: int) -> Receipt:
    """The first rows of these blocks, as blocks of their own."""
    if rows >= blocks.rows:
        return blocks
    batch = open_arrow(store.local(blocks) / "blocks.arrow").get_batch(0).slice(0, rows)
    columns = {name: batch.column(name) for name in batch.schema.names}
    with store.scratch() as folder:
        with ArrowWriter(folder / "blocks.arrow", batch.schema, metadata_of(batch.schema)) as writer:
            writer.write(columns)
        return store.commit(
            Ref("blocks", key_of("first", 1, {"rows": rows}, [blocks.key]), blocks.label),
            folder,
            schema=1,
            rows=rows,
            tokens=int(columns["length"].to_numpy().sum()),
            settings={"rows": rows},
            parents=[blocks.key],
        )
