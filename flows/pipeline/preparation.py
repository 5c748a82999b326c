"""Stages from sources to targets."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.inventory import model_ref
from flows.pipeline.engine import teacher_pool, text_pool
from flows.pipeline.jobs import _block_jobs, _calibration_jobs, _count_jobs, _source_jobs, _target_jobs
from flows.pipeline.stage import Job, run_stage
from flows.views.prefect_artifacts import publish_failures
from storage.artifact import Failure, Ref
from storage.maintenance import free_bytes
from storage.store import Store
from tasks.lineage import SAMPLE_SHARDS, Lineage, check_teacher, freeze_sample, trace
from tasks.plan.free_space import check_store_has_space
from tasks.recipe.config import Recipe

VERBS = {"source": "read", "blocks": "blocks", "counts": "count", "calibration": "calibrate", "targets": "teach"}
"""Stage, as in the store and in `distil status`, and the word that its task runs are named after."""


@dataclass(frozen=True)
class Selection:
    """What a retry is about: a stage, a shard of it, both or (all empty) whatever is missing.

    `force` makes again what is there already.
    """

    stage: str = ""
    shard: str = ""
    force: bool = False

    def takes(self, job: Job) -> bool:
        """True if the job is meant. A shard of text belongs to the job of its source, a mask variant to its shard."""
        if (self.stage or job.stage) not in (job.stage, "shard" if job.stage == "source" else job.stage):
            return False
        if job.stage == "source":
            return not self.shard or job.label in (self.shard, self.shard.rsplit("-", 1)[0])
        return not self.shard or self.shard in (job.label, job.label.rsplit(".v", 1)[0])

    def named(self, lineage: Lineage) -> bool:
        """True if the shard is one of this lineage, done or not."""
        labels = {ref.label for refs in lineage.stages().values() for ref in refs}
        return self.shard in labels | {source.label for source, _ in lineage.sources}


SELECT_ALL = Selection()


@dataclass(frozen=True)
class StageDone:
    """What one stage did in this run: jobs that it was about, failures among them, seconds."""

    stage: str
    jobs: int
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """The lineage after all stages, and what each of them did. Stages with nothing to do are not listed."""

    lineage: Lineage
    stages: tuple[StageDone, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures, in the order of the chain."""
        return tuple(failure for stage in self.stages for failure in stage.failures)

    def too_many_failed(self, recipe: Recipe) -> bool:
        """True if the run must end Failed; without counts or calibration nothing can follow at all."""
        vital = any(failure.kind in ("counts", "calibration") for failure in self.failures)
        return vital or len(self.failures) > recipe.run.max_failed


# ---- the stages --------------------------------------------------------------------------------------------


def prepare_corpus(store: Store, recipe: Recipe, only: Selection = SELECT_ALL, *, training: bool = False) -> Prepared:
    """Makes what is missing from sources to targets (or what `only` names). A shard's error never ends it early.

    FatalError before anything is made if the teacher cannot be used, the tokenizer does not fit it, or the store cannot
    hold all that is missing (with `training`, the checkpoints and the model that come after it too).
    """
    check_teacher(recipe)
    lineage = trace(store, recipe)
    if only == SELECT_ALL:
        check_free_space(store, recipe, lineage, training=training)
    lineage, stages = _text_stages(store, recipe, lineage, only)
    if _freeze_sample(store, recipe, lineage) != lineage.sample:
        lineage = trace(store, recipe)
    stages += _stage(store, recipe, only, _count_jobs(store, recipe, lineage))
    if recipe.targets.on_missing == "compute":
        stages += _teacher_stages(store, recipe, lineage, only)
    return Prepared(lineage, tuple(stages))


def silently_missing(store: Store, prepared: Prepared) -> list[Ref]:
    """Blocks and targets that are not there although nothing that they are made from failed in this run."""
    lineage = prepared.lineage
    excused = {plain_label(failure.label) for failure in prepared.failures}
    wanted = (*lineage.training_blocks, *(target.ref for target in lineage.targets))
    return [ref for ref in store.missing(wanted) if plain_label(ref.label) not in excused]


def plain_label(label: str) -> str:
    """The shard's label, without the mask variant."""
    return label.rsplit(".v", 1)[0]


def prepare_text(store: Store, recipe: Recipe) -> Prepared:
    """Makes shards and blocks only."""
    lineage, stages = _text_stages(store, recipe, trace(store, recipe), SELECT_ALL)
    return Prepared(lineage, tuple(stages))


def prepare_heldout(store: Store, recipe: Recipe) -> Prepared:
    """Makes held-out blocks only, for a score."""
    lineage, stages = _text_stages(store, recipe, trace(store, recipe), SELECT_ALL, heldout_only=True)
    return Prepared(lineage, tuple(stages))


def _text_stages(
    store: Store, recipe: Recipe, lineage: Lineage, only: Selection, *, heldout_only: bool = False
) -> tuple[Lineage, list[StageDone]]:
    """Sources, then blocks, outside this process; and the lineage as it is then."""
    with text_pool(recipe) as pool:
        stages = _stage(store, recipe, only, _source_jobs(store, recipe, lineage, pool), pool.width)
        if stages:
            lineage = trace(store, recipe)
        shards = lineage.heldout_shards if heldout_only else (*lineage.shards, *lineage.heldout_shards)
        stages += _stage(store, recipe, only, _block_jobs(store, recipe, lineage, shards, pool), pool.width)
    return lineage, stages


def _teacher_stages(store: Store, recipe: Recipe, lineage: Lineage, only: Selection) -> list[StageDone]:
    """Calibration, then targets, where the teacher is."""
    with teacher_pool(recipe) as pool:
        stages = _stage(store, recipe, only, _calibration_jobs(store, recipe, lineage, pool))
        if not store.missing(ref for ref in (lineage.counts, lineage.calibration) if ref):
            stages += _stage(store, recipe, only, _target_jobs(store, recipe, lineage, pool), pool.width)
    return stages


def _stage(store: Store, recipe: Recipe, only: Selection, jobs: Iterable[Job], width: int = 1) -> list[StageDone]:
    """Runs those of one stage's jobs that are missing (or forced). Empty if there are none."""
    meant = [job for job in jobs if only.takes(job)]
    missing = {ref.key for ref in store.missing(job.ref for job in meant if job.ref)}
    chosen = [replace(job, force=job.force or only.force) for job in meant]
    chosen = [job for job in chosen if job.force or job.ref is None or job.ref.key in missing]
    if not chosen:
        return []
    stage = chosen[0].stage
    start = time.monotonic()
    failures = run_stage(stage, VERBS[stage], chosen, store, recipe.run, min(width, recipe.run.window))
    return [StageDone(stage, len(chosen), tuple(failures), time.monotonic() - start)]


def _freeze_sample(store: Store, recipe: Recipe, lineage: Lineage) -> tuple[Ref, ...]:
    """Pins, and returns, what counts and calibration are estimated from: the first shards whose blocks are there.

    Once there is an estimate its sample stays, even when the blocks are gone: another one would rename all targets.
    """
    blocks = lineage.sample
    if store.missing(blocks):
        estimates = [ref for ref in (lineage.counts, lineage.calibration) if ref]
        if not store.missing(estimates):
            return blocks
        absent = {ref.key for ref in store.missing(lineage.training_blocks)}
        blocks = tuple(ref for ref in lineage.training_blocks if ref.key not in absent)[:SAMPLE_SHARDS]
    if blocks:
        freeze_sample(store, recipe, blocks)
    return blocks


def finish_state(recipe: Recipe, prepared: Prepared) -> State[Any]:
    """Shows the failures and gives the state that a flow without training ends in."""
    publish_failures(recipe, prepared.failures)
    if prepared.too_many_failed(recipe):
        return failed_state(prepared.failures)
    jobs = sum(stage.jobs for stage in prepared.stages)
    return Completed(message=f"{jobs - len(prepared.failures)} artifacts made" if jobs else "nothing to do")


def failed_state(failures: tuple[Failure, ...]) -> State[Any]:
    """Failed, with a sentence that names the first failure."""
    first = failures[0]
    others = f" and {len(failures) - 1} more" if failures[1:] else ""
    return Failed(
        message=f"{first.kind} {first.label} failed{others}: {first.message}; all others are done, "
        "mend the cause and start the same run again"
    )


def check_free_space(store: Store, recipe: Recipe, lineage: Lineage, *, training: bool) -> None:
    """FatalError if what is missing does not fit. Where nothing is, nothing is asked; an object store does not tell."""
    free = free_bytes(store)
    if free is not None and _lacks(store, recipe, lineage, training=training):
        check_store_has_space(store, recipe, lineage, free, training=training)


def _lacks(store: Store, recipe: Recipe, lineage: Lineage, *, training: bool) -> bool:
    """True if anything is still to be made."""
    if not training:
        return lineage.lacks(store)
    model = model_ref(store, recipe, lineage)
    return model is None or not store.has(model)
