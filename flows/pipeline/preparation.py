"""Runs the preparation stages of a recipe, from sources to targets, for all artifacts that are missing in the store.

    prepared = prepare_corpus(workspace)                        # sources, blocks, counts, calibration, targets
    prepared = prepare_corpus(workspace, Selection("blocks", "fr_meta_part_2-0000", force=True))
    return finish_state(prepared, command)                      # the Prefect state of a flow without training

Each stage first queries the store for missing artifacts; jobs.py lists its jobs and stage.py runs them.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.inventory import planned_model_if_prepared
from flows.pipeline.engine import teacher_pool, text_pool
from flows.pipeline.jobs import block_jobs, calibration_jobs, count_jobs, source_jobs, target_jobs
from flows.pipeline.stage import Job, run_stage
from flows.views.prefect_artifacts import publish_failures
from storage.artifact import Failure, Ref
from tasks.lineage import SAMPLE_SHARDS, Lineage, Workspace, check_teacher, freeze_sample
from tasks.plan.free_space import check_store_has_space, free_bytes

VERBS = {
    "source": "read",
    "blocks": "pack",
    "counts": "count tokens",
    "calibration": "calibrate",
    "targets": "compute targets",
}
"""Maps each stage, as named in the store and in `distil status`, to the verb in the names of its task runs."""


@dataclass(frozen=True)
class Selection:
    """Selects the jobs of a stage, of a shard, of one shard in one stage, or all jobs if both fields are empty.

    Selected jobs whose artifacts are missing are run; with `force`, all selected jobs are run.
    """

    stage: str = ""
    shard: str = ""
    force: bool = False

    def takes(self, job: Job) -> bool:
        """Returns True if the job is selected.

        The label of a shard selects the job that reads its source, and its targets for every mask variant.
        """
        if (self.stage or job.stage) not in (job.stage, "shard" if job.stage == "source" else job.stage):
            return False
        if job.stage == "source":
            return not self.shard or job.label in (self.shard, self.shard.rsplit("-", 1)[0])
        return not self.shard or self.shard in (job.label, plain_label(job.label))

    def exists_in(self, lineage: Lineage) -> bool:
        """Returns True if the lineage contains the selected shard or source, whether it is done or not."""
        labels = {ref.label for refs in lineage.stages().values() for ref in refs}
        return self.shard in labels | {source.label for source, _ in lineage.sources}


SELECT_ALL = Selection()


@dataclass(frozen=True)
class StageResult:
    """The result of one stage in this run: its number of jobs, its failures and its duration in seconds."""

    stage: str
    jobs: int
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """The workspace after all stages, and the result of each stage that ran any job."""

    workspace: Workspace
    stages: tuple[StageResult, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures, in the order of the stages."""
        return tuple(failure for stage in self.stages for failure in stage.failures)

    @property
    def too_many_failed(self) -> bool:
        """True if the run must end Failed: more than `run.max_failed` jobs failed, or the counts or calibration did."""
        vital = any(failure.kind in ("counts", "calibration") for failure in self.failures)
        return vital or len(self.failures) > self.workspace.recipe.run.max_failed


# ---- the stages --------------------------------------------------------------------------------------------


def prepare_corpus(workspace: Workspace, selection: Selection = SELECT_ALL, *, training: bool = False) -> Prepared:
    """Makes the missing or the selected artifacts, from sources to targets. A failed shard does not stop the others.

    FatalError before any artifact is made if the teacher cannot be used, the tokenizer does not match it, or the store
    has too little free space for all missing artifacts (with `training`, also for the checkpoints and the model).
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
    """Returns the blocks and targets that are missing although no job of their shard failed in this run."""
    lineage = prepared.workspace.lineage
    excused = {plain_label(failure.label) for failure in prepared.failures}
    wanted = (*lineage.training_blocks, *(target.ref for target in lineage.targets))
    return [ref for ref in prepared.workspace.store.missing(wanted) if plain_label(ref.label) not in excused]


def plain_label(label: str) -> str:
    """Returns the label of a shard without its mask variant."""
    return label.rsplit(".v", 1)[0]


def prepare_text(workspace: Workspace) -> Prepared:
    """Makes only shards and blocks."""
    workspace, stages = _text_stages(workspace, SELECT_ALL)
    return Prepared(workspace, tuple(stages))


def prepare_heldout(workspace: Workspace) -> Prepared:
    """Makes all shards, but blocks only of held-out ones, for scoring."""
    workspace, stages = _text_stages(workspace, SELECT_ALL, heldout_only=True)
    return Prepared(workspace, tuple(stages))


def _text_stages(
    workspace: Workspace, selection: Selection, *, heldout_only: bool = False
) -> tuple[Workspace, list[StageResult]]:
    """Runs the stages `source` and `blocks` in the text pool; returns the refreshed workspace and the results."""
    with text_pool(workspace.recipe) as pool:
        stages = _stage(workspace, selection, source_jobs(workspace, pool), pool.width)
        if stages:
            workspace = workspace.refreshed()
        lineage = workspace.lineage
        shards = lineage.heldout_shards if heldout_only else (*lineage.shards, *lineage.heldout_shards)
        stages += _stage(workspace, selection, block_jobs(workspace, shards, pool), pool.width)
    return workspace, stages


def _teacher_stages(workspace: Workspace, selection: Selection) -> list[StageResult]:
    """Runs the stages `calibration` and `targets` in the teacher pool; returns their results."""
    estimates = (workspace.lineage.counts, workspace.lineage.calibration)
    with teacher_pool(workspace.recipe) as pool:
        stages = _stage(workspace, selection, calibration_jobs(workspace, pool))
        if not workspace.store.missing(ref for ref in estimates if ref):
            stages += _stage(workspace, selection, target_jobs(workspace, pool), pool.width)
    return stages


def _stage(workspace: Workspace, selection: Selection, jobs: Iterable[Job], width: int = 1) -> list[StageResult]:
    """Runs the selected jobs of one stage that are forced or whose artifacts are missing.

    Returns a list with the result, or an empty list if no job was run.
    """
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
    return [StageResult(stage, len(chosen), tuple(failures), time.monotonic() - start)]


def _freeze_sample(workspace: Workspace) -> tuple[Ref, ...]:
    """Pins and returns the sample for counts and calibration: the first SAMPLE_SHARDS training blocks that exist.

    Once counts and calibration exist, the sample stays the same even if its blocks are lost, since a different sample
    would change the keys of all targets.
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
    """Publishes the failures and returns the final Prefect state of a flow without training."""
    publish_failures(prepared.workspace.recipe, prepared.failures, command)
    if prepared.too_many_failed:
        return failed_state(prepared.failures)
    jobs = sum(stage.jobs for stage in prepared.stages)
    return Completed(message=f"{jobs - len(prepared.failures)} artifacts made" if jobs else "nothing to do")


def failed_state(failures: tuple[Failure, ...]) -> State[Any]:
    """Returns the Prefect state Failed with a message about the first failure."""
    first = failures[0]
    others = f" and {len(failures) - 1} more" if failures[1:] else ""
    return Failed(
        message=f"{first.kind} {first.label} failed{others}: {first.message}; all other artifacts are done, fix the "
        "cause and repeat the run"
    )


def check_free_space(workspace: Workspace, *, training: bool) -> None:
    """FatalError if the missing artifacts do not fit into the free space of the store.

    Object stores have no limit, so they are not checked.
    """
    free = free_bytes(workspace.store)
    if free is not None and _lacks(workspace, training=training):
        check_store_has_space(workspace, free, training=training)


def _lacks(workspace: Workspace, *, training: bool) -> bool:
    """Returns True if any artifact is missing; `training` includes the model."""
    if not training:
        return workspace.lineage.lacks(workspace.store)
    model = planned_model_if_prepared(workspace)
    return model is None or not workspace.store.has(model)
