"""metrics.jsonl over steps, validation, kills and resumes."""

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
from tasks.recipe.run_json import Part, RunSpec
from tasks.train.checkpoint import TrainingProgress
from tasks.train.flops import Work
from tasks.train.metrics import HeldoutLosses, MetricsWriter, read_metrics
from tasks.train.step import StepCounts

COUNTS = StepCounts(selected=2, masked=1, tokens=1, stop=False)


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    """A run of which only the folder matters."""
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


def add_step(writer: MetricsWriter, step: int, *, due: bool) -> None:
    """Adds one step whose loss is its number."""
    losses, grad_norm = torch.full((4,), float(step)), torch.tensor(1.0)
    writer.add(TrainingProgress(step=step, tokens=step), losses, grad_norm, 0.1, COUNTS, 0.0, due=due)


def test_a_line_is_the_mean_of_the_steps_since_the_line_before(run: RunSpec) -> None:
    writer = MetricsWriter(run)
    for step in range(1, 7):
        add_step(writer, step, due=step % 3 == 0)
    lines = read_metrics(writer.path)
    assert [(line["step"], line["loss"], line["rows"]) for line in lines] == [(3, 2.0, 6), (6, 5.0, 6)]


def test_mfu_is_the_flops_of_a_line_over_its_seconds_and_the_rate(run: RunSpec) -> None:
    writer = MetricsWriter(run, Work(token=1e9, position=5e8), rate=1e12)
    for step in range(1, 5):
        add_step(writer, step, due=step % 2 == 0)
    for line in read_metrics(writer.path):
        assert line["mfu"] == pytest.approx((2 * 1e9 + 4 * 5e8) / line["seconds"] / 1e12)
    assert "mfu" not in line_without_a_rate(run)


def line_without_a_rate(run: RunSpec) -> dict[str, float]:
    """The first line of a writer without work and rate, as on a CPU."""
    writer = MetricsWriter(run)
    writer.path.unlink()
    add_step(writer, 1, due=True)
    return read_metrics(writer.path)[0]


def test_resume_removes_later_lines_and_an_incomplete_line(run: RunSpec) -> None:
    writer = MetricsWriter(run)
    for step in range(1, 5):
        add_step(writer, step, due=True)
        writer.validated(step, HeldoutLosses(1.0, 0.5))
    with writer.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    resumed = MetricsWriter(run)
    resumed.cut_back(2)
    add_step(resumed, 3, due=True)
    assert [(line["step"], "loss" in line) for line in read_metrics(writer.path)] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (3, True),
    ]


def test_a_kill_during_cut_back_loses_no_line(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(run)
    add_step(writer, 1, due=True)
    before = writer.path.read_bytes()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        writer.cut_back(1)
    assert writer.path.read_bytes() == before
    assert json.loads(before)["step"] == 1
