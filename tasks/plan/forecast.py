"""Forecasts the bytes, time and cost of a recipe, and whether caching the teacher's targets pays off.

    forecast = make_forecast(recipe, inventory, sample, shape, timings, machine, free, Prices())
    forecast.seconds["train"].left, forecast.sizes.bytes["targets"].total, forecast.advice

Called by `distil plan`. All forecasts are computed from the results of sizes.py, sample.py and timing.py; nothing runs
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import floor
from typing import Any, get_args

from tasks.eval.size_and_speed import LATENCY_BATCHES, LATENCY_SECONDS, LATENCY_TOKENS
from tasks.lineage import caches_targets
from tasks.plan.free_space import MARGIN
from tasks.plan.sample import Sample
from tasks.plan.sizes import (
    ROW_BYTES,
    Amount,
    Inventory,
    ModelShape,
    SizeForecast,
    cached_variants,
    counts_per_text_byte,
    forecast_sizes,
    payload_bytes,
    target_bytes,
)
from tasks.plan.timing import Machine, Timings
from tasks.recipe.config import Recipe, TargetSettings

FORWARD = 1 / 3
"""Share of the forward pass in a training step; validation and scoring run forward passes only."""

START, END = 3.5, 1.5
"""Times before the first shard (server, flow and worker processes) and after the scores (registration, card, gate), in
multiples of the trainer's import time: both are mostly imports and small writes, so they scale with the machine."""

TERABYTE, HOUR = 1e12, 3600.0


@dataclass(frozen=True)
class Prices:
    """Price per hour of the machine, and per terabyte and month of storage, in any one currency."""

    hour: float = 3.5
    terabyte_month: float = 23.0


@dataclass(frozen=True)
class Choice:
    """One way to cache targets: payload bytes per position, and bytes of all targets.

    `chosen` is True for the choice of the recipe.
    """

    encoding: str
    positions: str
    bytes_per_position: int
    bytes: float
    chosen: bool


@dataclass(frozen=True)
class BreakEven:
    """Compares cached with online training (teacher in the training loop).

    `capture` is the time to compute all targets once; `cached` and `online` are the times of one training run (all in
    seconds). `runs` is the least number of training runs for which caching takes less time, `runs_with_storage` that
    for which it costs less including a month of storage; 0 means never.
    """

    capture: float
    cached: float
    online: float
    runs: int
    runs_with_storage: int


@dataclass(frozen=True)
class Forecast:
    """Contents of the output of `distil plan`.

    read_rate  bytes per second that the trainer reads
    need       bytes still to be written, times MARGIN
    free       free bytes of the store, None if it does not report them
    cost       `machine`: cost of the remaining work; `storage_month`: cost of all artifacts per month
    """

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
        """Sum of the seconds of all stages."""
        return summed(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON; an amount has total, done and left."""
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
    """Computes the forecast of a complete run, or of `distil prepare` if `training` is False."""
    found = forecast_sizes(inventory, sample, shape, recipe, training=training)
    seconds = stage_seconds(recipe, inventory, sample, timings, machine, found, training=training)
    need = MARGIN * found.left
    choices = _choices(recipe, sample, shape, found) if recipe.teacher.model else ()
    with_teacher = training and recipe.loss.needs_teacher
    break_even = _break_even(recipe, timings, found, choices, prices) if with_teacher else None
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
    """Returns the number of worker processes that run at the same time: run.workers, limited by the cores."""
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
    """Forecasts the seconds of each stage. `at_once` processes make shards and blocks."""
    slots = at_once(recipe, machine)
    reading = sample.read_seconds / max(1.0, sample.source_bytes)
    longest = inventory.largest_unread * reading  # each source is read by one process
    blocking = sample.block_seconds / max(1, sample.text_bytes) / slots
    row_bytes = sample.text_bytes / max(1, sample.rows)
    all_text = inventory.text_bytes + inventory.heldout_bytes + found.unread_text_bytes
    read_left = max(inventory.unread_bytes * reading / slots, longest)
    seconds = {
        "source": _amount(max(inventory.source_bytes * reading / slots, longest), read_left),
        "blocks": _amount(all_text * blocking, found.bytes_without_blocks * blocking),
    }
    if cached_variants(recipe):
        rows_left = found.bytes_without_targets / row_bytes
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
    """Forecasts training with validation and checkpoints, and scoring without fine-tuned sets.

    `heldout` is the number of held-out blocks.
    """
    train, score = recipe.train, recipe.score
    row_forward = FORWARD * timings.step / train.batch_rows
    validations = found.steps // train.validate_steps if train.validate_steps else 0
    saves = -(-found.steps // train.checkpoint_steps)
    trained = machine.import_seconds + timings.start + found.steps * timings.step + saves * timings.save
    trained += validations * min(train.validate_rows, heldout) * row_forward
    both = row_forward + timings.capture
    forward = both * LATENCY_TOKENS / recipe.blocks.length
    scored = min(score.heldout_rows, heldout) * score.heldout_masks * both
    scored += min(LATENCY_SECONDS, score.latency_runs * sum(LATENCY_BATCHES) * forward)
    return {"train": Amount(trained), "score": Amount(scored)}


def summed(amounts: Mapping[str, Amount]) -> Amount:
    """Returns the sum of amounts."""
    return Amount(sum(one.total for one in amounts.values()), sum(one.done for one in amounts.values()))


def _amount(total: float, left: float) -> Amount:
    return Amount(total, total - left)


# ---- caching -----------------------------------------------------------------------------------------------


def _choices(recipe: Recipe, sample: Sample, shape: ModelShape, found: SizeForecast) -> tuple[Choice, ...]:
    """Returns the bytes of the corpus's targets in each encoding, for masked and for all positions."""
    targets = recipe.targets
    text = found.text.total * recipe.mask.variants
    cached = caches_targets(recipe)
    choices = []
    for encoding in get_args(TargetSettings.model_fields["encoding"].annotation):
        for positions in get_args(TargetSettings.model_fields["positions"].annotation):
            chosen = cached and (encoding, positions) == (targets.encoding, targets.positions)
            total = text * target_bytes(counts_per_text_byte(sample), shape, recipe, encoding, positions)
            size = found.bytes["targets"].total if chosen else total
            choices.append(Choice(encoding, positions, payload_bytes(shape, recipe, encoding), size, chosen))
    return tuple(choices)


def _break_even(
    recipe: Recipe, timings: Timings, found: SizeForecast, choices: tuple[Choice, ...], prices: Prices
) -> BreakEven:
    """Computes from which number of runs caching pays off.

    With an online teacher, every block passes through the teacher in every epoch; with cached targets, once per mask
    variant.
    """
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
    """Returns the least number of runs whose total saving exceeds the one-time cost `once`; 0 means never."""
    return floor(once / saved * (1 + 1e-9)) + 1 if saved > 0 else 0


def _read_rate(recipe: Recipe, sample: Sample, shape: ModelShape, timings: Timings) -> float:
    """Returns the bytes per second that the trainer reads: the blocks of each step and any cached targets."""
    rows = max(1, sample.rows)
    row_bytes = sample.block_bytes / rows
    if caches_targets(recipe):
        positions = sample.positions if recipe.targets.positions == "masked" else sample.tokens
        row_bytes += ROW_BYTES + positions / rows * payload_bytes(shape, recipe, recipe.targets.encoding)
    return recipe.train.batch_rows * row_bytes / timings.step if timings.step else 0.0


# ---- recommendation ----------------------------------------------------------------------------------------


def _advice(
    recipe: Recipe,
    need: float,
    free: int | None,
    found: SizeForecast,
    choices: tuple[Choice, ...],
    even: BreakEven | None,
) -> str:
    """Returns the recommendation as one sentence."""
    if free is not None and need > free:
        rest = found.left - found.bytes["targets"].left
        fitting = [one for one in choices if MARGIN * (rest + one.bytes) < free and one.encoding != "topk"]
        best = max(fitting, key=lambda one: one.bytes, default=None)
        if best and caches_targets(recipe):
            return (
                f"The run does not fit in the store: delete files, use a larger store, or set targets.encoding = "
                f"{best.encoding} and targets.positions = {best.positions}, which fit."
            )
        online = ", or set targets.source = online" if caches_targets(recipe) and MARGIN * rest < free else ""
        return f"The run does not fit in the store: delete files or use a larger store{online}."
    if even is None:
        return "The run fits in the store; no teacher is used." if free is not None else "No teacher is used."
    if even.runs == 0:
        return "The teacher's time is too short to measure; cached and online targets take the same time."
    if even.runs == 1:
        keep = "Keep" if recipe.targets.source == "cached" else "Set"
        return f"{keep} targets.source = cached: a run reads each target repeatedly, so caching pays off in one run."
    return (
        "For a single run, targets.source = online takes no longer and needs no storage; caching pays off from run "
        f"{even.runs} on, for example with a different student, temperature or training seed."
    )


def _plain(value: Any) -> Any:
    """Converts dataclasses to plain values, amounts with `left`; omits references to artifacts."""
    if isinstance(value, Amount):
        return {"total": value.total, "done": value.done, "left": value.left}
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name != "blocks" or not isinstance(value, Sample)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
