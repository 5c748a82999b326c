"""What `distil plan` does and prints: one measured sample, one timing, tables or JSON. Starts no server.

forecast = forecast_of(recipe, sample_bytes=4_000_000, prices=Prices())
show(recipe, forecast)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from flows.home import open_store
from flows.pool import workers
from flows.report import Rows, TextTable, number, show_sheet, show_table
from flows.report import seconds as duration
from flows.report import size as amount_of_bytes
from flows.start import with_local_start
from flows.status import model_ref
from storage.store import Store
from storage.upkeep import free_bytes
from tasks.config import Recipe
from tasks.lineage import check_teacher, trace, vocabulary_of
from tasks.pace import look_at_machine, measure
from tasks.plan import Forecast, Prices, at_once, make_forecast, summed
from tasks.sample import Sample, take_sample
from tasks.snapshot import Source
from tasks.volume import Amount, shape_of, take_stock

TIMED_SECONDS = 10.0
"""Teacher and student are each timed for about so long, or twice that."""


def forecast_of(recipe: Recipe, *, sample_bytes: int, prices: Prices, training: bool = True) -> Forecast:
    """Measures and computes. FatalError: sources, teacher or student that cannot be used."""
    recipe = with_local_start(recipe)
    check_teacher(recipe)
    store = open_store(recipe)
    lineage = trace(store, recipe)
    stock = take_stock(store, recipe, lineage, model_ref(store, recipe, lineage) if training else None)
    machine = look_at_machine()
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


# ---- tables ------------------------------------------------------------------------------------------------


def show(recipe: Recipe, forecast: Forecast) -> None:
    """Prints everything."""
    show_table(f"{forecast.recipe}: what it makes", made_table(forecast))
    show_table(f"Time, on {forecast.pace.device or 'this machine'}", time_table(forecast))
    if forecast.choices:
        show_table("Targets of the whole corpus", choice_table(recipe, forecast))
    show_sheet("Plan", {"": plan_rows(recipe, forecast)})


def made_table(forecast: Forecast) -> TextTable:
    """Counts of the training text, and bytes by stage: in all, there already, still to be made."""
    found = forecast.outlook
    counts = {"tokens": found.tokens, "blocks": found.blocks, "masked positions": found.positions}
    rows = [(name, *_three(one, number)) for name, one in counts.items()]
    rows.append(("text", *_three(found.text, amount_of_bytes)))
    sizes = {f"{name} (bytes)": one for name, one in found.bytes.items()}
    rows += [(name, *_three(one, amount_of_bytes)) for name, one in sizes.items()]
    rows.append(("together (bytes)", *_three(summed(found.bytes), amount_of_bytes)))
    return ("", "total", "done already", "remaining"), rows


def time_table(forecast: Forecast) -> TextTable:
    """Durations by stage."""
    stages = {**forecast.seconds, "together": forecast.total_seconds}
    return ("stage", "total", "done already", "remaining"), [
        (name, *_three(one, duration)) for name, one in stages.items()
    ]


def choice_table(recipe: Recipe, forecast: Forecast) -> TextTable:
    """Bytes of every encoding, for masked and for all positions; the recipe's own is marked."""
    sizes = {
        (one.encoding, one.positions): amount_of_bytes(one.bytes) + (" (recipe)" if one.chosen else "")
        for one in forecast.choices
    }
    payload = {one.encoding: number(one.a_position) for one in forecast.choices}
    rows = [(name, size, sizes[name, "masked"], sizes[name, "all"]) for name, size in payload.items()]
    return ("encoding", "bytes a position", "masked positions", "all positions"), rows


def plan_rows(recipe: Recipe, forecast: Forecast) -> Rows:
    """What was measured, what is needed, what it costs, what to do."""
    sample, pace, free = forecast.sample, forecast.pace, forecast.free
    documents = max(1, sample.documents)
    rows = [
        (
            "sample",
            f"{amount_of_bytes(sample.source_bytes)} of {sample.sources} sources, "
            f"{number(sample.documents)} documents: "
            f"{sample.heldout / documents:.1%} held out, {sample.dropped / documents:.1%} dropped, "
            f"{sample.tokens / max(1.0, sample.source_bytes):.2f} tokens a byte of source",
        )
    ]
    if pace.capture:
        rows.append(("teacher", f"{number(recipe.blocks.length / pace.capture)} tokens/s"))
    if pace.step:
        tokens = recipe.blocks.length * recipe.train.batch_rows
        rows.append(("training", f"{number(tokens / pace.step)} tokens/s, by steps of {pace.rows} blocks"))
        rows.append(("the trainer reads", f"{forecast.read_rate / 1e6:.2f} MB/s"))
    room = "unknown (the store does not tell)" if free is None else amount_of_bytes(free)
    rows += [
        ("room needed", f"{amount_of_bytes(forecast.need)}, 10 % to spare; free: {room}"),
        (
            "cost",
            f"{forecast.cost['machine']:.2f} for the machine, {forecast.cost['storage_month']:.2f} a month to keep",
        ),
    ]
    if even := forecast.break_even:
        rows.append(("one training", f"{duration(even.cached)} from the cache, {duration(even.online)} online"))
        rows.append(
            ("caching pays", f"from run {even.runs} on; from run {even.runs_with_storage} with a month of storage")
        )
    return [*rows, ("recommendation", forecast.advice)]


def _three(amount: Amount, shown: Callable[[float], str]) -> tuple[str, str, str]:
    return shown(amount.total), shown(amount.done), shown(amount.left)
