"""Checks before a run that its store has enough free space.

    check_store_has_space(workspace, free_bytes(store), training=True)

Called by the flows `distill` and `prepare` when artifacts are missing. Only bytes are estimated; nothing is timed.
"""

import shutil
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from storage.errors import FatalError
from storage.store import Store
from tasks.lineage import Workspace
from tasks.plan.sample import Sample, take_sample
from tasks.plan.sizes import forecast_sizes, shape_of, take_inventory
from tasks.recipe.config import Recipe

MARGIN = 1.1
"""Free space that a run needs, as a multiple of the bytes that it will write."""

CHECK_BYTES = 3_000_000
"""Bytes to read from the sources as a sample."""


def free_bytes(store: Store) -> int | None:
    """Returns the free bytes of a local store's file system, or None for an object store, which reports none."""
    if not store.is_local:
        return None
    folder = Path(store.path("")).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_store_has_space(workspace: Workspace, free: int, *, training: bool) -> None:
    """Checks that the remaining artifacts, times MARGIN, fit in the `free` bytes of the store; FatalError if not.

    If an upper bound that holds for any text fits, no source is read; otherwise, a small sample of the sources is read.
    Unreadable sources are skipped: the run itself reports all of them.
    """
    if workspace.recipe.train.warm_start:
        # Resolving a registered model needs MLflow; the student without a warm start has about the same size.
        workspace = workspace.with_warm_start("")
    recipe = workspace.recipe
    inventory, shape = take_inventory(workspace), shape_of(recipe, training=training)
    if forecast_sizes(inventory, _bound(recipe), shape, recipe, training=training).left * MARGIN < free:
        return
    sources = [source for source, _ in workspace.lineage.sources]
    with TemporaryDirectory(prefix="distil-sample-") as folder:
        scratch, settings = Store(f"{folder}/store"), (recipe.corpus, recipe.blocks, recipe.mask)
        sample = take_sample(scratch, *settings, workspace.vocabulary, sources, CHECK_BYTES, skip_bad=True)
    need = MARGIN * forecast_sizes(inventory, sample, shape, recipe, training=training).left
    if sample.text_bytes and need > free:
        raise FatalError(
            f"the store {recipe.store} has too little free space: this run needs about {_gigabytes(need)} (including a "
            f"margin of 10 %), but only {_gigabytes(free)} are free; delete files, set `store` to a larger store, or "
            "cache smaller targets (`distil plan` shows the size of each choice)"
        )


def _bound(recipe: Recipe) -> Sample:
    """Returns a sample with upper bounds for any text: compressed 20-fold, one token per byte, 50-byte documents."""
    length = recipe.blocks.length
    text = 10_000
    rows = text // 50 if recipe.blocks.packing == "documents" else text // (length - 2) + 1
    return Sample(
        source_bytes=text / 20,
        text_bytes=text,
        shard_bytes=2 * text,
        tokens=rows * length if recipe.blocks.packing == "documents" else text,
        rows=rows,
        positions=ceil(recipe.mask.rate * length) * rows,
        block_bytes=rows * (4 * length + 4),
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e7 else f"{count / 1e6:,.2g} MB"
