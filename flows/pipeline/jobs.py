"""The jobs of each preparation stage: one per artifact that a recipe needs."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest

from flows.pipeline.process_pool import Pool
from flows.pipeline.stage import Job, raise_if_stopped
from storage.artifact import Ref
from storage.errors import DistilError
from storage.store import Store
from tasks.corpus.shard import heldout_of, shard_source, shards_of, source_ref
from tasks.corpus.snapshot import Source, source_content
from tasks.lineage import Lineage, vocabulary_of
from tasks.recipe.config import Recipe
from tasks.targets.calibration import calibrate
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets, open_capture, with_capture
from tasks.tokens.blocks import count_tokens, make_blocks

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
        content = source_content(store, source)
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
    return partial(opened, raise_if_stopped) if pool.is_here else opened
