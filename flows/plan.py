"""What `distil plan` does and prints: one measured sample, one timing, tables or JSON. Starts no server.

forecast = forecast_of(recipe, sample_bytes=4_000_000, prices=Prices())
show(recipe, forecast)
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from flows.home import open_store
from flows.inventory import model_ref, with_local_start
from flows.pipeline.process_pool import workers
from storage.maintenance import free_bytes
from storage.store import Store
from tasks.corpus.snapshot import Source
from tasks.lineage import check_teacher, trace, vocabulary_of
from tasks.plan.forecast import Forecast, Prices, at_once, make_forecast
from tasks.plan.sample import Sample, take_sample
from tasks.plan.sizes import shape_of, take_inventory
from tasks.plan.timing import describe_machine, measure
from tasks.recipe.config import Recipe

TIMED_SECONDS = 10.0
"""Teacher and student are each timed for about so long, or twice that."""


def forecast_of(recipe: Recipe, *, sample_bytes: int, prices: Prices, training: bool = True) -> Forecast:
    """Measures and computes. FatalError: sources, teacher or student that cannot be used."""
    recipe = with_local_start(recipe)
    check_teacher(recipe)
    store = open_store(recipe)
    lineage = trace(store, recipe)
    stock = take_inventory(store, recipe, lineage, model_ref(store, recipe, lineage) if training else None)
    machine = describe_machine()
    with TemporaryDirectory(prefix="distil-plan-") as folder:
        scratch = [Store(Path(folder) / str(number)) for number in range(at_once(recipe, machine))]
        sample = _sample(scratch, recipe, [source for source, _ in lineage.sources], sample_bytes)
        pace = measure(scratch[0], recipe, sample.blocks, TIMED_SECONDS, training=training)
    shape, free = shape_of(recipe, training=training), free_bytes(store)
    return make_forecast(recipe, stock, sample, shape, pace, machine, free, prices, training=training)


def _sample(scratch: Sequence[Store], recipe: Recipe, sources: Sequence[Source], sample_bytes: int) -> Sample:
    """The same sample in as many worker processes as will work at once, since they slow each other down."""
    settings = (recipe.corpus, recipe.blocks, recipe.mask, vocabulary_of(recipe), sources, sample_bytes)
    run = recipe.run.model_copy(update={"workers": len(scratch)})
    with workers(run) as pool, ThreadPoolExecutor(len(scratch)) as threads:
        found = list(threads.map(lambda store: pool.call(run.shard_timeout, take_sample, store, *settings), scratch))
    return replace(
        found[0],
        read_seconds=mean(sample.read_seconds for sample in found),
        block_seconds=mean(sample.block_seconds for sample in found),
    )
