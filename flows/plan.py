"""Forecasts the time, storage and cost that `distil plan` prints, from a measured sample and timings.

Needs no Prefect or MLflow server.

forecast = forecast_of(recipe, sample_bytes=4_000_000, prices=Prices())
show_forecast(recipe, forecast)         # flows/views/forecast.py
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from flows.home import open_workspace
from flows.inventory import planned_model_if_prepared, with_local_start
from flows.pipeline.process_pool import workers
from storage.store import Store
from tasks.lineage import Workspace, check_teacher
from tasks.plan.forecast import Forecast, Prices, at_once, make_forecast
from tasks.plan.free_space import free_bytes
from tasks.plan.sample import Sample, take_sample
from tasks.plan.sizes import shape_of, take_inventory
from tasks.plan.timing import describe_machine, measure
from tasks.recipe.config import Recipe

TIMED_SECONDS = 10.0
"""Seconds for which the teacher and the student are timed; each may take up to about twice as long."""


def forecast_of(recipe: Recipe, *, sample_bytes: int, prices: Prices, training: bool = True) -> Forecast:
    """Measures a sample of the sources and this machine, and returns the forecast.

    FatalError: the sources, the teacher or the student are unusable.
    """
    workspace = with_local_start(open_workspace(recipe))
    recipe = workspace.recipe
    check_teacher(recipe)
    inventory = take_inventory(workspace, planned_model_if_prepared(workspace) if training else None)
    machine = describe_machine()
    with TemporaryDirectory(prefix="distil-plan-") as folder:
        scratch = [Store(Path(folder) / str(number)) for number in range(at_once(recipe, machine))]
        sample = _sample(scratch, workspace, sample_bytes)
        timings = measure(Workspace(scratch[0], recipe), sample.blocks, TIMED_SECONDS, training=training)
    shape, free = shape_of(recipe, training=training), free_bytes(workspace.store)
    return make_forecast(recipe, inventory, sample, shape, timings, machine, free, prices, training=training)


def _sample(scratch: Sequence[Store], workspace: Workspace, sample_bytes: int) -> Sample:
    """Takes the same sample in all worker processes at the same time, since they slow each other down.

    Returns the sample with the mean times over the processes.
    """
    recipe, sources = workspace.recipe, [source for source, _ in workspace.lineage.sources]
    settings = (recipe.corpus, recipe.blocks, recipe.mask, workspace.vocabulary, sources, sample_bytes)
    run = recipe.with_changes({"run.workers": len(scratch)}).run
    with workers(run) as pool, ThreadPoolExecutor(len(scratch)) as threads:
        found = list(threads.map(lambda store: pool.call(run.shard_timeout, take_sample, store, *settings), scratch))
    return replace(
        found[0],
        read_seconds=mean(sample.read_seconds for sample in found),
        block_seconds=mean(sample.block_seconds for sample in found),
    )
