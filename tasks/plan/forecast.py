"""What a recipe will cost, before anything runs: bytes, time, money, and whether caching the teacher pays.

    forecast = make_forecast(recipe, inventory, sample, shape, timings, machine, free, Prices())
    forecast.seconds["train"].left, forecast.bytes["targets"].total, forecast.advice

Arithmetic alone, on what sizes.py, sample.py and timing.py found. Called by `distil plan`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import floor
from typing import Any, get_args

from tasks.lineage import caches_targets
from tasks.plan.free_space import MARGIN
from tasks.plan.sample import Sample
from tasks.plan.sizes import (
    ROW_BYTES,
    Amount,
    Inventory,
    ModelShape,
    SizeForecast,
    bytes_per_text_byte,
    forecast_sizes,
    payload_bytes,
    target_bytes,
    variants_taught,
)
from tasks.plan.timing import Machine, Timings
from tasks.recipe.config import Recipe, TargetSettings

FORWARD = 1 / 3
"""Share of a training step that its forward takes; held-out looks and scores are forwards."""

START, END = 3.5, 1.5
"""Server, flow and worker processes before the first shard, and registration, card and gate after the scores, in
imports of the trainer: both are imports and small writes in the main, and follow the machine as that does."""

LATENCY_FORWARDS, LATENCY_TOKENS = 33, 128
"""What one round of the latency score runs: batches of 1 and of 32, of so many tokens."""

LATENCY_BUDGET = 60.0

TERABYTE, HOUR = 1e12, 3600.0


@dataclass(frozen=True)
class Prices:
    """What an hour of the machine costs, and a terabyte kept for a month, in any one currency."""

    hour: float = 3.5
    terabyte_month: float = 23.0


@dataclass(frozen=True)
class Choice:
    """One way to cache: payload bytes a position, bytes of all targets."""

    encoding: str
    positions: str
    a_position: int
    bytes: float
    chosen: bool


@dataclass(frozen=True)
class BreakEven:
    """Seconds to capture all targets once, of one training from them, of one with the teacher in the loop; the number
    of runs from which caching is cheaper in hours, and in money with a month of storage."""

    capture: float
    cached: float
    online: float
    runs: int
    runs_with_storage: int


@dataclass(frozen=True)
class Forecast:
    """All that `distil plan` prints. `read_rate` is what the trainer reads, in bytes a second; `need` has the margin;
    `free` is None where the store does not tell; `cost` of what is left: machine, and storage a month."""

    recipe: str
    sizes: SizeForecast
    sample: Sample
    timings: Timings
    seconds: Mapping[str, Amount]
    choices: tuple[Choice, ...]
    read_rate: float
    need: float
    free: int | None
    cost: Mapping[str, float]
    break_even: BreakEven | None
    advice: str

    @property
    def total_seconds(self) -> Amount:
        """All stages one after the other."""
        return summed(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """One document of plain values, amounts as total, done and left."""
        found: dict[str, Any] = _plain(self)
        return found | {"total_seconds": _plain(self.total_seconds)}


def make_forecast(
    recipe: Recipe,
    inventory: Inventory,
    sample: Sample,
    shape: ModelShape,
    timings: Timings,
    machine: Machine,
    free: int | None,
    prices: Prices,
    *,
    training: bool = True,
) -> Forecast:
    """Puts it all together; without `training` it is about `distil prepare`."""
    found = forecast_sizes(inventory, sample, shape, recipe, training=training)
    seconds = stage_seconds(recipe, inventory, sample, timings, machine, found, training=training)
    need = MARGIN * found.left
    choices = _choices(recipe, sample, shape, found) if recipe.teacher.model else ()
    taught = training and recipe.loss.needs_teacher
    break_even = _break_even(recipe, timings, found, choices, prices) if taught else None
    store = sum(amount.total for amount in found.bytes.values())
    cost = {
        "machine": summed(seconds).left / HOUR * prices.hour,
        "storage_month": store / TERABYTE * prices.terabyte_month,
    }
    return Forecast(
        recipe=recipe.name,
        sizes=found,
        sample=sample,
        timings=timings,
        seconds=seconds,
        choices=choices,
        read_rate=_read_rate(recipe, sample, shape, timings) if training else 0.0,
        need=need,
        free=free,
        cost=cost,
        break_even=break_even,
        advice=_advice(recipe, need, free, found, choices, break_even),
    )


def at_once(recipe: Recipe, machine: Machine) -> int:
    """Worker processes that really work side by side: run.workers, as far as there are cores for them."""
    return min(recipe.run.workers, machine.cores)


def stage_seconds(
    recipe: Recipe,
    inventory: Inventory,
    sample: Sample,
    timings: Timings,
    machine: Machine,
    found: SizeForecast,
    *,
    training: bool,
) -> dict[str, Amount]:
    """Seconds by stage. Shards and blocks run in run.workers processes, as far as there are cores for them."""
    slots = at_once(recipe, machine)
    reading = sample.read_seconds / max(1.0, sample.source_bytes)
    longest = inventory.largest_unread * reading  # one source is one process's work
    blocking = sample.block_seconds / max(1, sample.text_bytes) / slots
    row_bytes = sample.text_bytes / max(1, sample.rows)
    all_text = inventory.text_bytes + inventory.heldout_bytes + found.coming
    read_left = max(inventory.unread_bytes * reading / slots, longest)
    seconds = {
        "source": _amount(max(inventory.source_bytes * reading / slots, longest), read_left),
        "blocks": _amount(all_text * blocking, found.unblocked * blocking),
    }
    if variants_taught(recipe):
        rows_left = found.untaught / row_bytes
        rows = max(found.blocks.total * recipe.mask.variants, rows_left)
        once = timings.load + min(recipe.targets.calibration_rows, found.blocks.total) * timings.capture
        seconds["calibration"] = _amount(once, once if inventory.kept["targets"] == 0 else 0.0)
        seconds["targets"] = _amount(rows * timings.capture, rows_left * timings.capture)
    idle = machine.import_seconds * START
    if training:
        seconds |= _trained_seconds(recipe, timings, machine, found, all_text / row_bytes - found.blocks.total)
        if inventory.kept["model"]:
            seconds = {name: Amount(amount.total, amount.total) for name, amount in seconds.items()}
        idle += machine.import_seconds * END
    return seconds | {"start and end": _amount(idle, idle if found.left or not training else 0.0)}


def _trained_seconds(
    recipe: Recipe, timings: Timings, machine: Machine, found: SizeForecast, heldout: float
) -> dict[str, Amount]:
    """Training with its looks and checkpoints, and scores without fine-tuned sets; `heldout` are blocks."""
    train, score = recipe.train, recipe.score
    a_row = FORWARD * timings.step / train.batch_rows
    looks = found.steps // train.validate_steps if train.validate_steps else 0
    saves = -(-found.steps // train.checkpoint_steps)
    trained = machine.import_seconds + timings.start + found.steps * timings.step + saves * timings.save
    trained += looks * min(train.validate_rows, heldout) * a_row
    both = a_row + timings.capture
    forward = both * LATENCY_TOKENS / recipe.blocks.length
    scored = min(score.heldout_rows, heldout) * score.heldout_masks * both
    scored += min(LATENCY_BUDGET, score.latency_runs * LATENCY_FORWARDS * forward)
    return {"train": Amount(trained), "score": Amount(scored)}


def summed(amounts: Mapping[str, Amount]) -> Amount:
    """All stages together."""
    return Amount(sum(one.total for one in amounts.values()), sum(one.done for one in amounts.values()))


def _amount(total: float, left: float) -> Amount:
    return Amount(total, total - left)


# ---- caching -----------------------------------------------------------------------------------------------


def _choices(recipe: Recipe, sample: Sample, shape: ModelShape, found: SizeForecast) -> tuple[Choice, ...]:
    """Every encoding for masked and for all positions, over the whole corpus."""
    targets = recipe.targets
    text = found.text.total * recipe.mask.variants
    cached = caches_targets(recipe)
    choices = []
    for encoding in get_args(TargetSettings.model_fields["encoding"].annotation):
        for positions in get_args(TargetSettings.model_fields["positions"].annotation):
            chosen = cached and (encoding, positions) == (targets.encoding, targets.positions)
            total = text * target_bytes(bytes_per_text_byte(sample), shape, recipe, encoding, positions)
            size = found.bytes["targets"].total if chosen else total
            choices.append(Choice(encoding, positions, payload_bytes(shape, recipe, encoding), size, chosen))
    return tuple(choices)


def _break_even(
    recipe: Recipe, timings: Timings, found: SizeForecast, choices: tuple[Choice, ...], prices: Prices
) -> BreakEven:
    """A cached run trades a forward of the teacher on every block of every epoch for one on every block and mask."""
    teacher = found.steps * recipe.train.batch_rows * timings.capture
    step = found.steps * timings.step
    cached = step if recipe.targets.source == "cached" else max(0.0, step - teacher)
    capture = found.blocks.total * recipe.mask.variants * timings.capture
    targets = recipe.targets
    size = next(one.bytes for one in choices if (one.encoding, one.positions) == (targets.encoding, targets.positions))
    stored = size / TERABYTE * prices.terabyte_month / prices.hour * HOUR if prices.hour else 0.0
    return BreakEven(
        capture, cached, cached + teacher, runs_to_pay(capture, teacher), runs_to_pay(capture + stored, teacher)
    )


def runs_to_pay(once: float, saved: float) -> int:
    """The first number of runs that cost less with `once` spent and `saved` in each than without; 0 for never."""
    return floor(once / saved * (1 + 1e-9)) + 1 if saved > 0 else 0


def _read_rate(recipe: Recipe, sample: Sample, shape: ModelShape, timings: Timings) -> float:
    """Bytes a second: the blocks of a step and, from a cache, their targets."""
    rows = max(1, sample.rows)
    a_row = sample.block_bytes / rows
    if caches_targets(recipe):
        kept = sample.positions if recipe.targets.positions == "masked" else sample.tokens
        a_row += ROW_BYTES + kept / rows * payload_bytes(shape, recipe, recipe.targets.encoding)
    return recipe.train.batch_rows * a_row / timings.step if timings.step else 0.0


# ---- words -------------------------------------------------------------------------------------------------


def _advice(
    recipe: Recipe,
    need: float,
    free: int | None,
    found: SizeForecast,
    choices: tuple[Choice, ...],
    even: BreakEven | None,
) -> str:
    """What to do, in a sentence."""
    if free is not None and need > free:
        rest = found.left - found.bytes["targets"].left
        fitting = [one for one in choices if MARGIN * (rest + one.bytes) < free and one.encoding != "topk"]
        best = max(fitting, key=lambda one: one.bytes, default=None)
        if best and caches_targets(recipe):
            return (
                f"It does not fit: make room or name another store, or set targets.encoding = {best.encoding} and "
                f"targets.positions = {best.positions}, which fit."
            )
        online = " or set targets.source = online" if caches_targets(recipe) and MARGIN * rest < free else ""
        return f"It does not fit: make room, name another store{online}."
    if even is None:
        return "It fits; there is no teacher to cache." if free is not None else "There is no teacher to cache."
    if even.runs == 0:
        return "The teacher costs nothing that can be measured; cached or online makes no difference."
    if even.runs == 1:
        keep = "Keep" if recipe.targets.source == "cached" else "Set"
        return f"{keep} targets.source = cached: a run reads each target more than once, so it pays in the first run."
    return (
        "For a single run targets.source = online takes no longer and keeps nothing; caching pays from run "
        f"{even.runs} on: another student, temperature or training seed."
    )


def _plain(value: Any) -> Any:
    """Dataclasses as objects; amounts with what is left. Names of artifacts are left out."""
    if isinstance(value, Amount):
        return {"total": value.total, "done": value.done, "left": value.left}
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name != "blocks" or not isinstance(value, Sample)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
