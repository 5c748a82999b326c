"""The arithmetic of the forecast, on numbers that can be checked by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks.models.student import make_student
from tasks.plan.forecast import Forecast, Prices, make_forecast, runs_to_pay
from tasks.plan.sample import Sample
from tasks.plan.sizes import Inventory, ModelShape, shape_of
from tasks.plan.timing import Machine, Timings
from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tasks.tokens.vocabulary import load_vocabulary
from tests.harness.tiny import make_teacher

SAMPLE = Sample(
    sources=1,
    source_bytes=1_000,
    documents=10,
    text_bytes=4_000,
    shard_bytes=4_400,
    tokens=1_000,
    rows=10,
    positions=150,
    block_bytes=2_040,
    read_seconds=0.1,
    block_seconds=2.0,
)
INVENTORY = Inventory(
    sources=10,
    source_bytes=100_000,
    unread_bytes=100_000,
    largest_unread=10_000,
    text_bytes=0,
    heldout_bytes=0,
    bytes_without_blocks=0,
    bytes_without_targets=0,
    kept=dict.fromkeys(("shard", "blocks", "targets", "model"), 0),
)
FILES = 10 * (1_900 + 22 * 32)
"""Bytes of ten targets files, one per source, without their payload."""
TARGETS = 1_000 * 20 + 15_000 * 34 + FILES
"""int8: width + 2 bytes per position."""
TIMINGS = Timings("CPU", rows=10, load=0.0, capture=0.5, step=4.0, start=0.0, save=0.0)
"""The teacher takes half a second per block; a step has ten blocks."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "teacher"
    make_teacher(folder)
    return folder


def recipe_of(teacher: Path, **sections: dict[str, object]) -> Recipe:
    values: dict[str, object] = {
        "name": "tiny",
        "home": "/nowhere",
        "store": "/nowhere/store",
        "corpus": {"url": "/nowhere", "heldout_per_mille": 0},
        "blocks": {"length": 100},
        "teacher": {"model": str(teacher)},
        "student": {"layers": 2},
        "train": {"batch_rows": 10, "checkpoint_steps": 50},
        "run": {"workers": 4},
    }
    for name, section in sections.items():
        known = values.get(name, {})
        assert isinstance(known, dict)
        values[name] = known | section
    return make_recipe(values, "test")


def forecast(
    recipe: Recipe, inventory: Inventory = INVENTORY, free: int | None = 10**12, prices: Prices | None = None
) -> Forecast:
    shape = ModelShape(width=32, vocab_size=200, parameters=1_000)
    return make_forecast(recipe, inventory, SAMPLE, shape, TIMINGS, Machine(2, 1.0), free, prices or Prices(3.6, 10.0))


def test_bytes_by_stage(teacher: Path) -> None:
    found = forecast(recipe_of(teacher)).sizes
    assert found.text.total == 400_000
    assert found.blocks.total == 1_000
    assert found.tokens.total == 100_000
    assert found.positions.total == 15_000
    assert found.steps == 100
    assert found.bytes["shard"].total == pytest.approx(440_000)
    assert found.bytes["blocks"].total == pytest.approx(204_000)
    assert found.bytes["targets"].total == pytest.approx(TARGETS)
    assert found.bytes["checkpoint"].total == 2 * 3 * 4_000
    assert found.bytes["model"].total > 4_000


def test_the_best_checkpoint_is_counted_where_the_result_is_the_best(teacher: Path) -> None:
    recipe = recipe_of(teacher).with_changes({"train.result": "best", "train.validate_steps": 50})
    assert forecast(recipe).sizes.bytes["checkpoint"].total == 3 * 3 * 4_000


def test_done_and_remaining_artifacts_are_counted_separately(teacher: Path) -> None:
    """Half of the sources were read; their text has no targets yet."""
    inventory = replace(
        INVENTORY,
        unread_bytes=50_000,
        text_bytes=200_000,
        bytes_without_targets=200_000,
        kept={"shard": 220_000, "blocks": 102_000, "targets": 0, "model": 0},
    )
    found = forecast(recipe_of(teacher), inventory)
    shard, blocks, targets = (found.sizes.bytes[name] for name in ("shard", "blocks", "targets"))
    assert (shard.total, shard.done, shard.left) == pytest.approx((440_000, 220_000, 220_000))
    assert (blocks.total, blocks.left) == pytest.approx((204_000, 102_000))
    assert (targets.total, targets.left) == pytest.approx((TARGETS, TARGETS))
    assert found.seconds["source"].left == pytest.approx(found.seconds["source"].total / 2)
    assert found.seconds["targets"].left == pytest.approx(500)
    assert found.need == pytest.approx(1.1 * found.sizes.left)


def test_seconds_by_stage_are_limited_by_the_cores(teacher: Path) -> None:
    found = forecast(recipe_of(teacher)).seconds
    assert found["source"].total == pytest.approx(5.0)
    assert found["blocks"].total == pytest.approx(100.0)
    assert found["targets"].total == pytest.approx(500.0)
    assert found["train"].total == pytest.approx(400.0 + 1.0)  # steps, and importing the trainer
    one = forecast(recipe_of(teacher, run={"workers": 1})).seconds
    assert one["blocks"].total == pytest.approx(200.0)


def test_one_source_is_the_work_of_one_process(teacher: Path) -> None:
    found = forecast(recipe_of(teacher), replace(INVENTORY, sources=1, largest_unread=100_000)).seconds
    assert found["source"].total == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("once", "saved", "runs"), [(5, 10, 1), (10, 10, 2), (19, 10, 2), (25, 10, 3), (0, 10, 1), (1, 0, 0)]
)
def test_runs_to_pay(once: float, saved: float, runs: int) -> None:
    assert runs_to_pay(once, saved) == runs


def test_break_even_of_one_epoch_is_the_second_run(teacher: Path) -> None:
    """1,000 blocks: 500 s to capture, 400 s from the cache, 900 s online."""
    found = forecast(recipe_of(teacher))
    assert found.break_even is not None
    assert found.break_even.capture == pytest.approx(500)
    assert found.break_even.cached == pytest.approx(400)
    assert found.break_even.online == pytest.approx(900)
    assert found.break_even.runs == 2
    assert "from run 2 on" in found.advice
    # 556 kB for a month at a million per terabyte: 0.56; saved by a run: 500 s at 3.6 per hour: 0.5.
    expensive = forecast(recipe_of(teacher), prices=Prices(3.6, 1_000_000.0))
    assert expensive.break_even is not None
    assert (expensive.break_even.runs, expensive.break_even.runs_with_storage) == (2, 3)


def test_several_epochs_pay_at_once_and_several_masks_do_not(teacher: Path) -> None:
    thrice = forecast(recipe_of(teacher, train={"epochs": 3.0}))
    assert thrice.break_even is not None
    assert thrice.break_even.runs == 1
    assert "Keep targets.source = cached" in thrice.advice
    masks = forecast(recipe_of(teacher, train={"epochs": 3.0}, mask={"variants": 3}))
    assert masks.break_even is not None
    assert masks.break_even.runs == 2
    assert masks.sizes.bytes["targets"].total == pytest.approx(3 * TARGETS)


def test_an_online_recipe_is_timed_with_its_teacher(teacher: Path) -> None:
    found = forecast(recipe_of(teacher, targets={"source": "online"}, train={"batch_rows": 5}))
    assert found.break_even is not None
    assert found.break_even.cached == pytest.approx(200 * (4.0 - 5 * 0.5))
    assert found.break_even.online == pytest.approx(200 * 4.0)
    assert found.sizes.bytes["targets"].total == 0
    assert "targets" not in found.seconds


def test_every_encoding_is_a_choice_and_the_recipe_own_is_marked(teacher: Path) -> None:
    choices = {(one.encoding, one.positions): one for one in forecast(recipe_of(teacher)).choices}
    assert len(choices) == 8
    assert choices["bf16", "all"].bytes == pytest.approx(1_000 * 20 + 100_000 * 64)
    assert choices["int4", "masked"].bytes == pytest.approx(1_000 * 20 + 15_000 * 17)
    assert [key for key, one in choices.items() if one.chosen] == [("int8", "masked")]


def test_money_and_rate(teacher: Path) -> None:
    found = forecast(recipe_of(teacher))
    assert found.cost["machine"] == pytest.approx(found.total_seconds.left / 3_600 * 3.6)
    total = sum(amount.total for amount in found.sizes.bytes.values())
    assert found.cost["storage_month"] == pytest.approx(total / 1e12 * 10)
    # A step of ten blocks takes four seconds; a block has its ids, 20 bytes, and 15 positions of 34 bytes.
    assert found.read_rate == pytest.approx(10 * (204 + 20 + 15 * 34) / 4.0)


def test_a_run_that_does_not_fit_gets_settings_that_would(teacher: Path) -> None:
    everything = recipe_of(teacher, targets={"positions": "all"})
    found = forecast(everything, free=2_000_000)
    assert found.need > 2_000_000
    assert "does not fit" in found.advice
    assert "targets.positions = masked" in found.advice
    assert "does not fit" not in forecast(everything, free=None).advice


def test_json_has_every_amount_three_times(teacher: Path) -> None:
    value = forecast(recipe_of(teacher)).to_json()
    assert value["sizes"]["bytes"]["shard"] == {
        "total": pytest.approx(440_000),
        "done": 0,
        "left": pytest.approx(440_000),
    }
    assert value["total_seconds"]["total"] == pytest.approx(sum(one["total"] for one in value["seconds"].values()))
    assert "blocks" not in value["sample"]


def test_the_shape_is_that_of_the_real_models(teacher: Path) -> None:
    recipe = recipe_of(teacher, blocks={"length": 64})
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(teacher)
    student = make_student(model, load_vocabulary(str(teacher)), layers=2)
    found = shape_of(recipe)
    assert found.width == 32
    assert found.vocab_size == model.config.vocab_size
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    fresh = recipe_of(teacher, student={"init": "config", "config": {"model_type": "roberta", "hidden_size": 48}})
    assert shape_of(fresh).parameters > 0
