"""Lists the jobs of each preparation stage, one per artifact that a recipe needs.

    with text_pool(recipe) as pool:
        jobs = list(block_jobs(workspace, workspace.lineage.shards, pool))
        run_stage("blocks", "blocks", jobs, workspace.store, recipe.run, window=4)

preparation.py selects the jobs whose artifacts are missing.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest

from flows.pipeline.process_pool import Pool
from flows.pipeline.stage import Job, raise_if_stopped
from flows.pipeline.task_policy import job_timeout
from storage.artifact import Ref
from storage.errors import DistilError
from storage.store import Store
from tasks.corpus.shard import heldout_of, shard_source, shards_of, source_ref
from tasks.corpus.snapshot import Source, source_content
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.targets.calibration import calibrate
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets, open_capture, with_capture
from tasks.tokens.blocks import make_blocks
from tasks.tokens.token_counts import count_tokens


def source_jobs(workspace: Workspace, pool: Pool) -> Iterator[Job]:
    """Yields one job per source, which hashes and reads it and writes its shards.

    If a shard of a source is missing, the job reads that source again even if its own artifact exists.
    """
    store, lineage = workspace.store, workspace.lineage
    absent = {ref.key for ref in store.missing((*lineage.shards, *lineage.heldout_shards))}
    read = store.receipts_of(ref for _, ref in lineage.sources if ref) if absent else []
    # Compared by key, since the shards of a renamed source keep their old labels.
    lacking = {one.key for one in read if absent & {shard.key for shard in (*shards_of(one), *heldout_of(one))}}
    for source, ref in lineage.sources:
        lost = ref is not None and ref.key in lacking
        yield Job("source", source.label, ref, partial(_read_source, pool, store, source, workspace.recipe), lost)


def _read_source(pool: Pool, store: Store, source: Source, recipe: Recipe, *, force: bool) -> None:
    try:
        pool.call(job_timeout(recipe.run), shard_source, store, source, recipe.corpus, force=force)
    except DistilError as error:
        # Failures are stored by key, and a source without a checksum has no key until its content is hashed.
        content = source_content(store, source)
        if content:
            store.fail(source_ref(source, content, recipe.corpus), error)
        raise


def block_jobs(workspace: Workspace, shards: Iterable[Ref], pool: Pool) -> Iterator[Job]:
    """Yields one job per existing shard."""
    store, recipe = workspace.store, workspace.recipe
    absent = {ref.key for ref in store.missing(shards)}
    for shard in shards:
        if shard.key not in absent:
            timeout = job_timeout(recipe.run)
            work = partial(pool.call, timeout, make_blocks, store, shard, recipe.blocks, workspace.vocabulary)
            yield Job("blocks", shard.label, (workspace.lineage.blocks or {})[shard], work)


def count_jobs(workspace: Workspace) -> Iterator[Job]:
    """Yields one job for the token counts of the sample if the masks depend on token frequency."""
    lineage = workspace.lineage
    if lineage.counts:
        work = partial(count_tokens, workspace.store, lineage.sample, workspace.vocabulary)
        yield Job("counts", lineage.counts.label, lineage.counts, work)


def calibration_jobs(workspace: Workspace, pool: Pool) -> Iterator[Job]:
    """Yields the job that computes the teacher's channel statistics on sample blocks, if the encoding needs them."""
    lineage = workspace.lineage
    if lineage.calibration:
        opener = _capture_opener(workspace, None, pool)
        timeout = job_timeout(workspace.recipe.run)
        work = partial(pool.call, timeout, with_capture, calibrate, opener, workspace.store, lineage.sample)
        yield Job("calibration", lineage.calibration.label, lineage.calibration, work)


def target_jobs(workspace: Workspace, pool: Pool) -> Iterator[Job]:
    """Yields one job per mask variant of each shard whose blocks exist."""
    store, lineage = workspace.store, workspace.lineage
    absent = {ref.key for ref in store.missing(lineage.training_blocks)}
    opener = _capture_opener(workspace, lineage.calibration, pool)
    timeout = job_timeout(workspace.recipe.run)
    ready = [target for target in lineage.targets if target.blocks.key not in absent]
    for target, following in zip_longest(ready, ready[1:]):
        work = partial(with_capture, make_targets, opener, store, target.blocks, variant=target.variant)
        if pool.is_here and following:  # in a pool of processes, the next shard of each process is unknown
            work = partial(work, following=following.blocks)
        yield Job("targets", target.ref.label, target.ref, partial(pool.call, timeout, work))


def _capture_opener(workspace: Workspace, calibration: Ref | None, pool: Pool) -> Callable[[], Capture]:
    """Returns a function that opens the teacher in the calling process. Each process loads the teacher once."""
    recipe = workspace.recipe
    opener = partial(
        open_capture,
        workspace.store,
        recipe.teacher,
        workspace.vocabulary,
        recipe.mask,
        recipe.targets,
        workspace.lineage.counts,
        calibration,
        recipe.train.device,
    )
    # Work in this process must poll whether the run was stopped; the pool kills other processes.
    return partial(opener, raise_if_stopped) if pool.is_here else opener
