"""From a corpus folder to the teacher's targets: sources, shards, blocks, token counts, calibration, targets.

    prepare(recipe)        a flow of its own (deployment `prepare`), and the first half of `distill`

Each stage asks the store what is missing and submits only that; a shard that fails holds back only what is made of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

from prefect import State
from prefect.states import Completed, Failed

from flows.bind import bound_flow
from flows.engine import teacher_pool, text_pool
from flows.home import open_store
from flows.pool import Pool
from flows.room import check_room
from flows.shown import publish_failures
from flows.stage import Job, go_on, run_stage
from storage.artifact import Failure, Ref
from storage.error import DistilError
from storage.store import Store
from tasks.block import count_tokens, make_blocks
from tasks.capture import Capture
from tasks.config import Recipe
from tasks.lineage import SAMPLE_SHARDS, Lineage, check_teacher, pin_sample, trace, vocabulary_of
from tasks.recipe import placed
from tasks.shard import heldout_of, shard_source, shards_of, source_ref
from tasks.snapshot import Source, content_of
from tasks.teach import calibrate, make_targets, open_capture, with_capture

VERBS = {"source": "read", "blocks": "blocks", "counts": "count", "calibration": "calibrate", "targets": "teach"}
"""Stage, as in the store and in `distil status`, and the word that its task runs are named after."""


@dataclass(frozen=True)
class Only:
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


EVERYTHING = Only()


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


def prepare_corpus(store: Store, recipe: Recipe, only: Only = EVERYTHING, *, training: bool = False) -> Prepared:
    """Makes what is missing from sources to targets (or what `only` names). A shard's error never ends it early.

    FatalError before anything is made if the teacher cannot be used, the tokenizer does not fit it, or the store cannot
    hold all that is missing (with `training`, the checkpoints and the model that come after it too).
    """
    check_teacher(recipe)
    lineage = trace(store, recipe)
    if only == EVERYTHING:
        check_room(store, recipe, lineage, training=training)
    lineage, stages = _text_stages(store, recipe, lineage, only)
    if _freeze_sample(store, recipe, lineage) != lineage.sample:
        lineage = trace(store, recipe)
    stages += _stage(store, recipe, only, _count_jobs(store, recipe, lineage))
    if recipe.targets.on_missing == "compute":
        stages += _teacher_stages(store, recipe, lineage, only)
    return Prepared(lineage, tuple(stages))


def unexplained(store: Store, prepared: Prepared) -> list[Ref]:
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
    lineage, stages = _text_stages(store, recipe, trace(store, recipe), EVERYTHING)
    return Prepared(lineage, tuple(stages))


def prepare_heldout(store: Store, recipe: Recipe) -> Prepared:
    """Makes held-out blocks only, for a score."""
    lineage, stages = _text_stages(store, recipe, trace(store, recipe), EVERYTHING, heldout_only=True)
    return Prepared(lineage, tuple(stages))


def _text_stages(
    store: Store, recipe: Recipe, lineage: Lineage, only: Only, *, heldout_only: bool = False
) -> tuple[Lineage, list[StageDone]]:
    """Sources, then blocks, outside this process; and the lineage as it is then."""
    with text_pool(recipe) as pool:
        stages = _stage(store, recipe, only, _source_jobs(store, recipe, lineage, pool), pool.width)
        if stages:
            lineage = trace(store, recipe)
        shards = lineage.heldout_shards if heldout_only else (*lineage.shards, *lineage.heldout_shards)
        stages += _stage(store, recipe, only, _block_jobs(store, recipe, lineage, shards, pool), pool.width)
    return lineage, stages


def _teacher_stages(store: Store, recipe: Recipe, lineage: Lineage, only: Only) -> list[StageDone]:
    """Calibration, then targets, where the teacher is."""
    with teacher_pool(recipe) as pool:
        stages = _stage(store, recipe, only, _calibration_jobs(store, recipe, lineage, pool))
        if not store.missing(ref for ref in (lineage.counts, lineage.calibration) if ref):
            stages += _stage(store, recipe, only, _target_jobs(store, recipe, lineage, pool), pool.width)
    return stages


def _stage(store: Store, recipe: Recipe, only: Only, jobs: Iterable[Job], width: int = 1) -> list[StageDone]:
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
        pin_sample(store, recipe, blocks)
    return blocks


# ---- jobs of each stage ------------------------------------------------------------------------------------


def _source_jobs(store: Store, recipe: Recipe, lineage: Lineage, pool: Pool) -> Iterator[Job]:
    """One job a source: hash, read, cut into shards. A source of which a shard was lost is read again."""
    absent = {ref.key for ref in store.missing((*lineage.shards, *lineage.heldout_shards))}
    read = store.receipts_of(ref for _, ref in lineage.sources if ref) if absent else []
    # By key: a source that was renamed since keeps its shards under their old labels.
    lacking = {one.key for one in read if absent & {shard.key for shard in (*shards_of(one), *heldout_of(one))}}
    for source, ref in lineage.sources:
        lost = ref is not None and ref.key in lacking
        yield Job("source", source.label, ref, partial(_read_source, pool, store, source, recipe), lost)


def _read_source(pool: Pool, store: Store, source: Source, recipe: Recipe, *, force: bool) -> None:
    try:
        pool.call(recipe.run.shard_timeout, shard_source, store, source, recipe.corpus, force=force)
    except DistilError as error:
        # A source without checksum has no key before it was read once; now it may have one to note the failure under.
        content = content_of(store, source)
        if content:
            store.fail(source_ref(source, content, recipe.corpus), error)
        raise


def _block_jobs(store: Store, recipe: Recipe, lineage: Lineage, shards: Iterable[Ref], pool: Pool) -> Iterator[Job]:
    """One job a shard that is there."""
    vocabulary = vocabulary_of(recipe)
    absent = {ref.key for ref in store.missing(shards)}
    for shard in shards:
        if shard.key not in absent:
            timeout = recipe.run.shard_timeout
            work = partial(pool.call, timeout, make_blocks, store, shard, recipe.blocks, vocabulary)
            yield Job("blocks", shard.label, (lineage.blocks or {})[shard], work)


def _count_jobs(store: Store, recipe: Recipe, lineage: Lineage) -> Iterator[Job]:
    """Token counts of the sample, where masks are smoothed by them."""
    if lineage.counts:
        work = partial(count_tokens, store, lineage.sample, vocabulary_of(recipe))
        yield Job("counts", lineage.counts.label, lineage.counts, work)


def _calibration_jobs(store: Store, recipe: Recipe, lineage: Lineage, pool: Pool) -> Iterator[Job]:
    """The teacher's channel statistics over the sample, where the encoding needs them."""
    if lineage.calibration:
        opened = _opened(store, recipe, lineage, None, pool)
        timeout = recipe.run.shard_timeout
        work = partial(pool.call, timeout, with_capture, calibrate, opened, store, lineage.sample)
        yield Job("calibration", lineage.calibration.label, lineage.calibration, work)


def _target_jobs(store: Store, recipe: Recipe, lineage: Lineage, pool: Pool) -> Iterator[Job]:
    """One job a shard and mask variant whose blocks are there."""
    absent = {ref.key for ref in store.missing(lineage.training_blocks)}
    opened = _opened(store, recipe, lineage, lineage.calibration, pool)
    timeout = recipe.run.shard_timeout
    there = [target for target in lineage.targets if target.blocks.key not in absent]
    for target, after in zip_longest(there, there[1:]):
        teach = partial(with_capture, make_targets, opened, store, target.blocks, variant=target.variant)
        if pool.is_here and after:  # elsewhere nobody knows which shard comes next
            teach = partial(teach, following=after.blocks)
        yield Job("targets", target.ref.label, target.ref, partial(pool.call, timeout, teach))


def _opened(
    store: Store, recipe: Recipe, lineage: Lineage, calibration: Ref | None, pool: Pool
) -> Callable[[], Capture]:
    """Opens what the teacher's work needs, in whatever process calls it; the teacher is loaded once in each."""
    opened = partial(
        open_capture,
        store,
        recipe.teacher,
        vocabulary_of(recipe),
        recipe.mask,
        recipe.targets,
        lineage.counts,
        calibration,
        recipe.train.device,
    )
    # In this process a shard looks now and then whether the run was told to stop; others are ended from here.
    return partial(opened, go_on) if pool.is_here else opened


# ---- flow and failures -------------------------------------------------------------------------------------


def run_prepare(recipe: Recipe, until: Literal["blocks", "targets"] = "targets") -> State[Any]:
    """Makes shards, blocks and targets of a corpus, as far as they are missing; trains nothing.

    Args:
        recipe: Everything that the run needs to know, section by section as in a recipe file.
        until: blocks stops before the teacher is needed, for a machine without a GPU.
    """
    recipe = placed(recipe)
    store = open_store(recipe)
    prepared = prepare_corpus(store, recipe) if until == "targets" else prepare_text(store, recipe)
    return close(recipe, prepared)


prepare = bound_flow(run_prepare, "prepare", run_name="{name}")


def close(recipe: Recipe, prepared: Prepared) -> State[Any]:
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
