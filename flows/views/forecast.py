"""Prints a forecast of bytes, time, target encodings and cost, as tables or as JSON.

show_forecast(recipe, forecast, as_json=False)
"""

from collections.abc import Callable

from flows.views.tables import Rows, Table, number, show_json, show_table
from flows.views.tables import seconds as duration
from flows.views.tables import size as amount_of_bytes
from tasks.plan.forecast import Forecast, summed
from tasks.plan.sizes import Amount
from tasks.recipe.config import Recipe


def show_forecast(recipe: Recipe, forecast: Forecast, *, as_json: bool = False) -> None:
    """Prints all tables, or the same numbers as JSON."""
    if as_json:
        show_json(forecast.to_json())
        return
    show_table(made_table(forecast))
    show_table(time_table(forecast))
    if forecast.choices:
        show_table(choice_table(recipe, forecast))
    show_table(Table("Plan", {"": plan_rows(recipe, forecast)}))


def made_table(forecast: Forecast) -> Table:
    """Returns a table of counts of the training text and of bytes by stage: total, done and remaining."""
    found = forecast.sizes
    counts = {"tokens": found.tokens, "blocks": found.blocks, "masked positions": found.positions}
    rows = [(name, *_three(one, number)) for name, one in counts.items()]
    rows.append(("text", *_three(found.text, amount_of_bytes)))
    sizes = {f"{name} (bytes)": one for name, one in found.bytes.items()}
    rows += [(name, *_three(one, amount_of_bytes)) for name, one in sizes.items()]
    rows.append(("all (bytes)", *_three(summed(found.bytes), amount_of_bytes)))
    return Table(f"{forecast.recipe}: counts and bytes", {"": rows}, ("", "total", "done", "remaining"))


def time_table(forecast: Forecast) -> Table:
    """Returns a table of durations by stage: total, done and remaining."""
    stages = {**forecast.seconds, "all": forecast.total_seconds}
    rows = [(name, *_three(one, duration)) for name, one in stages.items()]
    title = f"Time on {forecast.timings.device or 'this machine'}"
    return Table(title, {"": rows}, ("stage", "total", "done", "remaining"))


def choice_table(recipe: Recipe, forecast: Forecast) -> Table:
    """Returns a table of the bytes of every encoding, for masked and for all positions; marks the recipe's choice."""
    sizes = {
        (one.encoding, one.positions): amount_of_bytes(one.bytes) + (" (recipe)" if one.chosen else "")
        for one in forecast.choices
    }
    payload = {one.encoding: number(one.bytes_per_position) for one in forecast.choices}
    rows = [(name, size, sizes[name, "masked"], sizes[name, "all"]) for name, size in payload.items()]
    header = ("encoding", "bytes per position", "masked positions", "all positions")
    return Table("Targets of the complete corpus", {"": rows}, header)


def plan_rows(recipe: Recipe, forecast: Forecast) -> Rows:
    """Returns rows of measurements, required space, cost and recommendation."""
    sample, timings, free = forecast.sample, forecast.timings, forecast.free
    documents = max(1, sample.documents)
    rows = [
        (
            "sample",
            f"{amount_of_bytes(sample.source_bytes)} of {sample.sources} sources, "
            f"{number(sample.documents)} documents: "
            f"{sample.heldout / documents:.1%} held out, {sample.dropped / documents:.1%} dropped, "
            f"{sample.tokens / max(1.0, sample.source_bytes):.2f} tokens per source byte",
        )
    ]
    if timings.capture:
        rows.append(("teacher", f"{number(recipe.blocks.length / timings.capture)} tokens/s"))
    if timings.step:
        tokens = recipe.blocks.length * recipe.train.batch_rows
        rows.append(
            ("training", f"{number(tokens / timings.step)} tokens/s, timed with steps of {timings.rows} blocks")
        )
        rows.append(("trainer input", f"{forecast.read_rate / 1e6:.2f} MB/s"))
    free_text = "unknown" if free is None else amount_of_bytes(free)
    rows += [
        ("required space", f"{amount_of_bytes(forecast.need)}, including a margin of 10 %; free: {free_text}"),
        ("cost", f"machine {forecast.cost['machine']:.2f}, storage {forecast.cost['storage_month']:.2f} per month"),
    ]
    if even := forecast.break_even:
        rows.append(
            ("one training run", f"{duration(even.cached)} from the cache, {duration(even.online)} with online teacher")
        )
        rows.append(
            (
                "cache pays off",
                f"from training run {even.runs}; with one month of storage, from training run {even.runs_with_storage}",
            )
        )
    return [*rows, ("recommendation", forecast.advice)]


def _three(amount: Amount, shown: Callable[[float], str]) -> tuple[str, str, str]:
    return shown(amount.total), shown(amount.done), shown(amount.left)
