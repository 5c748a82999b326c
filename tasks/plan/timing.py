"""Measures the speed of this machine: imports, and the capture of targets and the trainer on a few blocks.

    timings = measure(Workspace(Store(folder), recipe), sample.blocks, seconds=10)      # in a scratch store

Called by `distil plan`. Batches have the shape of the recipe's batches if `seconds` suffice; on a slow device, fewer
blocks are timed and the time is scaled. The shortest of several steps is used, to exclude the load of other processes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from storage.arrow import BLOCKS_FILE, ArrowWriter, metadata_of, open_arrow
from storage.artifact import Receipt, Ref
from storage.errors import FatalError
from storage.fingerprint import key_of
from storage.store import Store
from tasks.lineage import Workspace, caches_targets, part_of
from tasks.parent_death import set_parent_death_signal
from tasks.recipe.run_json import METRICS, Part, make_run
from tasks.targets.calibration import calibrate
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets, open_capture
from tasks.targets.keys import needs_calibration
from tasks.tokens.token_counts import count_tokens
from tasks.train.checkpoint import TrainingProgress, save_checkpoint
from tasks.train.export import describe_hardware
from tasks.train.metrics import read_metrics
from tasks.train.optimizer import make_optimizer
from tasks.train.process import StopSignal, keep_freed_memory, pick_device
from tasks.train.setup import set_up_training
from tasks.train.step import Ranks
from tasks.train.trainer import Trainer

WARM, TIMED = 3, 5
"""Untimed warm-up steps (in which memory is allocated and kernels are compiled), and timed steps."""

FIRST_TOKENS = 2048
"""Tokens in the first, rough timing of the teacher, which also calibrates the channels."""

STEP_FORWARDS = 1.5
"""Approximate time of a training step per block, in teacher forward passes; only used to select how many are timed."""


@dataclass(frozen=True)
class Machine:
    """Number of cores that this process may use, and seconds to import the trainer in a new process."""

    cores: int
    import_seconds: float


@dataclass(frozen=True)
class Timings:
    """Seconds on one device; `load` and `capture` are 0 without a teacher.

    load     time to load the teacher into memory
    capture  time to compute, encode and write the targets of one block under one mask
    step     time of one optimizer step of the complete batch, scaled from `rows` blocks
    start    time to build the student, and the extra time of the first steps
    save     time to write one checkpoint
    """

    device: str
    rows: int
    load: float
    capture: float
    step: float
    start: float
    save: float


def describe_machine() -> Machine:
    """Counts the cores, and measures the time to import the trainer in a new process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tasks.train.trainer"], check=True)
    return Machine(len(os.sched_getaffinity(0)), time.perf_counter() - started)


def measure(workspace: Workspace, blocks: Sequence[Ref], seconds: float, *, training: bool = True) -> Timings:
    """Times teacher and student on the largest of these blocks artifacts, each for one to two times `seconds`.

    Without `training`, the student is not timed, and neither is the teacher if no targets are cached. The workspace
    must have a scratch store, which is written to. Runs in a separate process, because the thread and memory settings
    of a trainer cannot be undone.

    FatalError if the teacher or the student cannot be used, if the blocks are empty, or if the process dies.
    """
    if not training and not caches_targets(workspace.recipe):
        return Timings("", 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    with ProcessPoolExecutor(
        1, get_context("spawn"), initializer=set_parent_death_signal, initargs=(signal.SIGTERM, os.getpid())
    ) as executor:
        try:
            return executor.submit(_measure, workspace, blocks, seconds, training).result()
        except BrokenProcessPool as error:
            raise FatalError(
                f"recipe {workspace.recipe.name}: the process that timed teacher and student died, probably because "
                "memory ran out; lower train.batch_rows, or run `distil plan` on a machine with more memory"
            ) from error


def _measure(workspace: Workspace, blocks: Sequence[Ref], seconds: float, training: bool) -> Timings:
    store, recipe = workspace.store, workspace.recipe
    largest = max((store.receipt(ref) for ref in blocks), key=lambda receipt: receipt.rows, default=None)
    if largest is None or not largest.rows:
        raise FatalError(
            f"recipe {recipe.name}: the sample of {recipe.corpus.url} contains no text; correct corpus.url or the "
            "filters of the corpus"
        )
    workspace = workspace.with_changes({"store": store.root, "home": f"{store.root}/home", "mask.variants": 1})
    counts = count_tokens(store, [largest.ref], workspace.vocabulary).ref if recipe.mask.kind == "smoothed" else None
    if recipe.loss.needs_teacher:
        timed = _time_teacher(workspace, largest, counts, seconds)
    else:
        some = _first(store, largest, recipe.train.batch_rows)
        timed = _TimedTeacher(part_of(some, ()), 0.0, 0.0, seconds / recipe.train.batch_rows / (WARM + TIMED))
    if not training:
        return Timings("", 0, timed.load, timed.capture, 0.0, 0.0, 0.0)
    return _time_student(workspace, timed, counts, seconds)


class _TimedTeacher(NamedTuple):
    """Blocks with targets; seconds to load the teacher, to capture one block, and (rough) to train on one block."""

    part: Part
    load: float
    capture: float
    rough_step: float


def _time_teacher(workspace: Workspace, blocks: Receipt, counts: Ref | None, seconds: float) -> _TimedTeacher:
    store, recipe = workspace.store, workspace.recipe
    few = _first(store, blocks, max(1, FIRST_TOKENS // recipe.blocks.length))
    started = time.perf_counter()
    capture = _open(workspace, counts, None)
    load = time.perf_counter() - started
    for force in (False, True):  # the first call allocates memory and loads kernels
        calibration = calibrate(store, [few.ref], capture, force=force)
    rough = max(calibration.timings["seconds"], 1e-3) / few.rows
    some = _first(store, blocks, max(few.rows, int(seconds / rough)))
    capture = _open(workspace, counts, calibration.ref if needs_calibration(recipe.targets) else None)
    for force in (False, True):
        targets = make_targets(store, some.ref, capture, force=force)
    probed = targets.info["probe"]["rows"]
    return _TimedTeacher(
        part_of(some, (targets.key,)), load, targets.timings["seconds"] / (some.rows + probed), STEP_FORWARDS * rough
    )


def _open(workspace: Workspace, counts: Ref | None, calibration: Ref | None) -> Capture:
    recipe, settings = workspace.recipe, (workspace.recipe.mask, workspace.recipe.targets)
    return open_capture(
        workspace.store, recipe.teacher, workspace.vocabulary, *settings, counts, calibration, recipe.train.device
    )


def _time_student(workspace: Workspace, timed: _TimedTeacher, counts: Ref | None, seconds: float) -> Timings:
    """Runs the trainer for a few steps, on the complete batch of one rank or on as many blocks as time permits."""
    store, recipe = workspace.store, workspace.recipe
    rank_rows = -(-recipe.train.batch_rows // recipe.train.ranks)
    rows = max(1, min(rank_rows, int(seconds / (WARM + TIMED) / timed.rough_step)))
    steps = {"batch_rows": rows, "max_steps": WARM + TIMED, "log_steps": 1, "validate_steps": 0}
    train = recipe.train.model_copy(update=steps | {"checkpoint_steps": 10**9})
    run = make_run(
        recipe.with_changes({"train": train}),
        manifest=(timed.part,),
        heldout=(),
        teacher_fingerprint=workspace.teacher_fingerprint,
        start="",
        counts=counts.key if counts else "",
    )
    torch.set_num_threads(train.threads or torch.get_num_threads())
    keep_freed_memory()  # as in the trainer; cannot be undone, so the teacher is timed before
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
    return Timings(
        device=describe_hardware(trainer.device, train.ranks),
        rows=rows,
        load=timed.load,
        capture=timed.capture,
        step=step * rank_rows / rows,
        start=max(0.0, looped - (WARM + TIMED) * step),
        save=saved,
    )


def _first(store: Store, blocks: Receipt, rows: int) -> Receipt:
    """Returns the first rows of these blocks as a new blocks artifact."""
    if rows >= blocks.rows:
        return blocks
    batch = open_arrow(store.local_folder(blocks) / BLOCKS_FILE).get_batch(0).slice(0, rows)
    columns = {name: batch.column(name) for name in batch.schema.names}
    with store.scratch() as folder:
        with ArrowWriter(folder / BLOCKS_FILE, batch.schema, metadata_of(batch.schema)) as writer:
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
