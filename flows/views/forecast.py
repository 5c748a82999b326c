"""Prints a forecast as tables: bytes, time, money, and what each encoding would cost."""

from collections.abc import Callable

from flows.views.tables import Rows, TextTable, number, show_sheet, show_table
from flows.views.tables import seconds as duration
from flows.views.tables import size as amount_of_bytes
from tasks.plan.forecast import Forecast, summed
from tasks.plan.sizes import Amount
from tasks.recipe.config import Recipe

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
    found = forecast.sizes
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
