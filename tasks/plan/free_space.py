"""Whether the store has room for a run, asked before anything is computed.

    check_store_has_space(workspace, free_bytes(store), training=True)

Called by the flows `distill` and `prepare` where something is missing. Bytes only; nothing is timed.
"""

from math import ceil
from tempfile import TemporaryDirectory

from storage.errors import FatalError
from storage.store import Store
from tasks.lineage import Workspace
from tasks.plan.sample import Sample, take_sample
from tasks.plan.sizes import forecast_sizes, shape_of, take_inventory
from tasks.recipe.config import Recipe

MARGIN = 1.1
"""A store must have room for so many times what is to be made."""

CHECK_BYTES = 3_000_000
"""Bytes of the sources that are sampled for it."""


def check_store_has_space(workspace: Workspace, free: int, *, training: bool) -> None:
    """FatalError if what is still to be made, with some margin, does not go into the `free` bytes of the store.

    Nothing is read where a bound that no text reaches shows that it fits; else a small sample of the sources is.
    Sources that cannot be read are left to the run, which names them all.
    """
    if workspace.recipe.train.warm_start:  # only MLflow may know it; its size is near that of the student without it
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
            f"the store {recipe.store} has no room for this run: it needs about {_gigabytes(need)}, 10 % to spare, and "
            f"{_gigabytes(free)} are free; make space, name another store, or make less (`distil plan` shows what each "
            "choice takes)"
        )


def _bound(recipe: Recipe) -> Sample:
    """Ratios above those of any text: packed to a twentieth, two bytes a token, a document every fifty bytes."""
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
