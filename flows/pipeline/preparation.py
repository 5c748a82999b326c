"""Runs the preparation stages of a recipe, from sources to targets, for all artifacts that the store lacks.

    prepared = prepare_corpus(workspace)                        # sources, blocks, counts, calibration, targets
    prepared = prepare_corpus(workspace, Selection("blocks", "fr_meta_part_2-0000", force=True))
    return finish_state(prepared, command)                      # the Prefect state of a flow without training

Each stage queries the store for missing artifacts first; jobs.py lists its jobs and stage.py runs them.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.inventory import model_ref
from flows.pipeline.engine import teacher_pool, text_pool
from flows.pipeline.jobs import block_jobs, calibration_jobs, count_jobs, source_jobs, target_jobs
from flows.pipeline.stage import Job, run_stage
from flows.views.prefect_artifacts import publish_failures
from storage.artifact import Failure, Ref
from tasks.lineage import SAMPLE_SHARDS, Lineage, Workspace, check_teacher, freeze_sample
from tasks.plan.free_space import check_store_has_space, free_bytes

VERBS = {"source": "read", "blocks": "blocks", "counts": "count", "calibration": "calibrate", "targets": "teach"}
"""Stage, as in the store and in `distil status`, and the verb in the names of its task runs."""


@dataclass(frozen=True)
class Selection:
    """The jobs of a retry: those of a stage, of a shard, of a shard in a stage, or (both empty) all.

    Of these the missing artifacts are made; with `force` also those that exist.
    """

    stage: str = ""
    shard: str = ""
    force: bool = False

    def takes(self, job: Job) -> bool:
        """True if the job is selected. A shard of text selects the job of its source, a shard all its mask variants."""
        if (self.stage or job.stage) not in (job.stage, "shard" if job.stage == "source" else job.stage):
            return False
        if job.stage == "source":
            return not self.shard or job.label in (self.shard, self.shard.rsplit("-", 1)[0])
        return not self.shard or self.shard in (job.label, job.label.rsplit(".v", 1)[0])

    def named(self, lineage: Lineage) -> bool:
        """True if the selected shard or source exists in this lineage, done or not."""
        labels = {ref.label for refs in lineage.stages().values() for ref in refs}
        return self.shard in labels | {source.label for source, _ in lineage.sources}


SELECT_ALL = Selection()


@dataclass(frozen=True)
class StageDone:
    """The result of one stage in this run: number of jobs, the failures among them, seconds."""

    stage: str
    jobs: int
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """The workspace after all stages, and the result of each stage that had something to do."""

    workspace: Workspace
    stages: tuple[StageDone, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures, in the order of the stages."""
        return tuple(failure for stage in self.stages for failure in stage.failures)

    @property
    def too_many_failed(self) -> bool:
        """True if the run must end Failed: more than `run.max_failed` failures, or no counts or calibration."""
        vital = any(failure.kind in ("counts", "calibration") for failure in self.failures)
        return vital or len(self.failures) > self.workspace.recipe.run.max_failed


# ---- the stages --------------------------------------------------------------------------------------------


def prepare_corpus(workspace: Workspace, selection: Selection = SELECT_ALL, *, training: bool = False) -> Prepared:
    """Makes the missing (or the selected) artifacts from sources to targets. The failure of one shard stops no other.

    FatalError before anything is made if the teacher cannot be used, the tokenizer does not fit it, or the store has
    too little free space for all that is missing (with `training` also for the checkpoints and the model).
    """
    check_teacher(workspace.recipe)
    if selection == SELECT_ALL:
        check_free_space(workspace, training=training)
    workspace, stages = _text_stages(workspace, selection)
    if _freeze_sample(workspace) != workspace.lineage.sample:
        workspace = workspace.refreshed()
    stages += _stage(workspace, selection, count_jobs(workspace))
    if workspace.recipe.targets.on_missing == "compute":
        stages += _teacher_stages(workspace, selection)
    return Prepared(workspace, tuple(stages))


def silently_missing(prepared: Prepared) -> list[Ref]:
    """Blocks and targets that do not exist although none of their inputs failed in this run."""
    lineage = prepared.workspace.lineage
    excused = {plain_label(failure.label) for failure in prepared.failures}
    wanted = (*lineage.training_blocks, *(target.ref for target in lineage.targets))
    return [ref for ref in prepared.workspace.store.missing(wanted) if plain_label(ref.label) not in excused]


def plain_label(label: str) -> str:
    """The shard's label, without the mask variant."""
    return label.rsplit(".v", 1)[0]


def prepare_text(workspace: Workspace) -> Prepared:
    """Makes shards and blocks only."""
    workspace, stages = _text_stages(workspace, SELECT_ALL)
    return Prepared(workspace, tuple(stages))


def prepare_heldout(workspace: Workspace) -> Prepared:
    """Makes held-out blocks only, for a score."""
    workspace, stages = _text_stages(workspace, SELECT_ALL, heldout_only=True)
    return Prepared(workspace, tuple(stages))


def _text_stages(
    workspace: Workspace, selection: Selection, *, heldout_only: bool = False
) -> tuple[Workspace, list[StageDone]]:
    """Runs sources, then blocks, in other processes; returns the refreshed workspace and the results."""
    with text_pool(workspace.recipe) as pool:
        stages = _stage(workspace, selection, source_jobs(workspace, pool), pool.width)
        if stages:
            workspace = workspace.refreshed()
        lineage = workspace.lineage
        shards = lineage.heldout_shards if heldout_only else (*lineage.shards, *lineage.heldout_shards)
        stages += _stage(workspace, selection, block_jobs(workspace, shards, pool), pool.width)
    return workspace, stages


def _teacher_stages(workspace: Workspace, selection: Selection) -> list[StageDone]:
    """Runs calibration, then targets, in the pool that has the teacher."""
    estimates = (workspace.lineage.counts, workspace.lineage.calibration)
    with teacher_pool(workspace.recipe) as pool:
        stages = _stage(workspace, selection, calibration_jobs(workspace, pool))
        if not workspace.store.missing(ref for ref in estimates if ref):
            stages += _stage(workspace, selection, target_jobs(workspace, pool), pool.width)
    return stages


def _stage(workspace: Workspace, selection: Selection, jobs: Iterable[Job], width: int = 1) -> list[StageDone]:
    """Runs the jobs of one stage whose artifacts are missing (or forced). An empty list if there are none."""
    store, run = workspace.store, workspace.recipe.run
    selected = [job for job in jobs if selection.takes(job)]
    missing = {ref.key for ref in store.missing(job.ref for job in selected if job.ref)}
    chosen = [replace(job, force=job.force or selection.force) for job in selected]
    chosen = [job for job in chosen if job.force or job.ref is None or job.ref.key in missing]
    if not chosen:
        return []
    stage = chosen[0].stage
    start = time.monotonic()
    failures = run_stage(stage, VERBS[stage], chosen, store, run, min(width, run.window))
    return [StageDone(stage, len(chosen), tuple(failures), time.monotonic() - start)]


def _freeze_sample(workspace: Workspace) -> tuple[Ref, ...]:
    """Pins and returns the sample for counts and calibration: the blocks of the first shards that exist.

    Once counts or calibration exist the sample stays, even if its blocks are lost: another sample would change the keys
    of all targets.
    """
    store, lineage = workspace.store, workspace.lineage
    blocks = lineage.sample
    if store.missing(blocks):
        estimates = [ref for ref in (lineage.counts, lineage.calibration) if ref]
        if not store.missing(estimates):
            return blocks
        absent = {ref.key for ref in store.missing(lineage.training_blocks)}
        blocks = tuple(ref for ref in lineage.training_blocks if ref.key not in absent)[:SAMPLE_SHARDS]
    if blocks:
        freeze_sample(workspace, blocks)
    return blocks


def finish_state(prepared: Prepared, command: str) -> State[Any]:
    """Publishes the failures and returns the final state of a flow without training."""
    publish_failures(prepared.workspace.recipe, prepared.failures, command)
    if prepared.too_many_failed:
        return failed_state(prepared.failures)
    jobs = sum(stage.jobs for stage in prepared.stages)
    return Completed(message=f"{jobs - len(prepared.failures)} artifacts made" if jobs else "nothing to do")


def failed_state(failures: tuple[Failure, ...]) -> State[Any]:
    """The state Failed, with a message that names the first failure."""
    first = failures[0]
    others = f" and {len(failures) - 1} more" if failures[1:] else ""
    return Failed(
        message=f"{first.kind} {first.label} failed{others}: {first.message}; all others are done, "
        "fix the cause and start the same run again"
    )


def check_free_space(workspace: Workspace, *, training: bool) -> None:
    """FatalError if the missing artifacts do not fit. No check if none is missing or an object store has no limit."""
    free = free_bytes(workspace.store)
    if free is not None and _lacks(workspace, training=training):
        check_store_has_space(workspace, free, training=training)


def _lacks(workspace: Workspace, *, training: bool) -> bool:
    """True if any artifact is missing."""
    if not training:
        return workspace.lineage.lacks(workspace.store)
    model = model_ref(workspace)
    return model is None or not workspace.store.has(model)
