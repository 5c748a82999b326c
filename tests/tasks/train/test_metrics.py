"""metrics.jsonl over steps, looks, kills and resumes."""

import json
from pathlib import Path

import pytest
import torch

from tasks.recipe.config import (
    BlockSettings,
    LossSettings,
    MaskSettings,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
    TrainSettings,
)
from tasks.recipe.run_spec import Part, RunSpec
from tasks.train.checkpoint import TrainingProgress
from tasks.train.flops import Work
from tasks.train.metrics import HeldoutLosses, MetricsWriter, read_metrics
from tasks.train.step import StepCounts


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    """Only its folder matters here."""
    return RunSpec(
        run_key="0" * 64,
        name="tiny",
        store=str(tmp_path / "store"),
        folder=str(tmp_path / "run"),
        blocks=BlockSettings(),
        mask=MaskSettings(),
        teacher=TeacherSettings(),
        targets=TargetSettings(),
        student=StudentSettings(),
        loss=LossSettings(),
        train=TrainSettings(),
        teacher_fingerprint="",
        manifest=(Part(label="p", blocks="0" * 64, rows=1, tokens=1),),
    )


def take(meter: MetricsWriter, step: int, *, due: bool) -> None:
    """One step whose loss is its number."""
    parts, norm = torch.full((4,), float(step)), torch.tensor(1.0)
    meter.add(TrainingProgress(step=step, tokens=step), parts, norm, 0.1, StepCounts(2, 1, 1, stop=False), 0.0, due=due)


def test_a_line_is_the_mean_of_the_steps_since_the_last_one(run: RunSpec) -> None:
    meter = MetricsWriter(run)
    for step in range(1, 7):
        take(meter, step, due=step % 3 == 0)
    lines = read_metrics(meter.path)
    assert [(line["step"], line["loss"], line["rows"]) for line in lines] == [(3, 2.0, 6), (6, 5.0, 6)]


def test_mfu_is_the_arithmetic_of_a_line_over_its_seconds(run: RunSpec) -> None:
    meter = MetricsWriter(run, Work(token=1e9, position=5e8), rate=1e12)
    for step in range(1, 5):
        take(meter, step, due=step % 2 == 0)
    for line in read_metrics(meter.path):
        assert line["mfu"] == pytest.approx((2 * 1e9 + 4 * 5e8) / line["seconds"] / 1e12)
    assert "mfu" not in run_without_a_rate(run)


def run_without_a_rate(run: RunSpec) -> dict[str, float]:
    """The first line of a meter that does not know what to measure against, as on a CPU."""
    meter = MetricsWriter(run)
    meter.path.unlink()
    take(meter, 1, due=True)
    return read_metrics(meter.path)[0]


def test_on_resume_later_lines_and_a_line_cut_short_are_gone(run: RunSpec) -> None:
    meter = MetricsWriter(run)
    for step in range(1, 5):
        take(meter, step, due=True)
        meter.validated(step, HeldoutLosses(1.0, 0.5))
    with meter.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    resumed = MetricsWriter(run)
    resumed.cut_back(2)
    take(resumed, 3, due=True)
    assert [(line["step"], "loss" in line) for line in read_metrics(meter.path)] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (3, True),
    ]


def test_a_kill_while_the_file_is_cut_back_loses_no_line(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MetricsWriter(run)
    take(meter, 1, due=True)
    before = meter.path.read_bytes()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        meter.cut_back(1)
    assert meter.path.read_bytes() == before
    assert json.loads(before)["step"] == 1
