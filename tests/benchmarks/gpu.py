"""Capture, training and the reference step on one GPU, at the size of camembert-base, over several batch sizes.

    python -m tests.benchmarks.gpu                     one GPU, about a quarter of an hour
    python -m tests.benchmarks.gpu --batches 128 256 --steps 60
    python -m tests.benchmarks.gpu --tiny              a small model on the CPU: shows that it runs, measures nothing

Needs the project installed and 10 GB of disk in TMPDIR. Prints a table and writes it into tests/benchmarks/results/.

Weights and ids are random: speed does not depend on them. Capture is make_targets of tasks.targets.compute, from
blocks on disk to targets on disk; training is the loop of tasks.train with its loader, without checkpoints, its first
lines (compiling) left out; the reference is tests/benchmarks/reference.py under bf16 autocast, its batch on the device
beforehand. MFU is the arithmetic that the case needs (with the last layer only where it is asked for; for the reference
all of it) against the bf16 matrix rate measured in the same run. Memory is the most that torch allocated. data wait is
the share of the time that the loop stood still for data.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tasks.models.student import make_student
from tasks.recipe.config import BlockSettings, LossSettings, MaskSettings, Recipe, TargetSettings, TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_spec import make_run
from tasks.targets.compute import make_targets
from tasks.train.checkpoint import TrainingProgress
from tasks.train.flops import matrix_rate, synchronize
from tasks.train.metrics import read_metrics
from tasks.train.optimizer import make_optimizer
from tasks.train.process import StopSignal
from tasks.train.setup import TrainingSetup
from tasks.train.step import Ranks
from tasks.train.teacher_signal import CachedTeacher, OnlineTeacher
from tasks.train.trainer import Trainer
from tests.benchmarks.flops import case_flops
from tests.benchmarks.reference import reference_batch, reference_step
from tests.benchmarks.results import RESULTS, Report, facts_of, notes_of, publish
from tests.benchmarks.synthetic import CAMEMBERT, TINY, Bench, Size, cached, first_batch, open_bench, random_bench

WARM_LINES = 2
"""Lines of metrics that do not count: compiling, first allocations."""
LINES = 6
"""Lines in all, so that the steps of one are a sixth of a run."""


@dataclass(frozen=True)
class Case:
    """One line; `reach`, in tokens a second, is meant for one H200. None: out of memory, or no such figure."""

    case: str
    batch_rows: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    data_wait: float | None = None
    reach: float | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What is measured, and with how much of it."""

    size: Size
    device: str
    batches: tuple[int, ...]
    steps: int
    rows: int
    compile: bool


FULL = Plan(CAMEMBERT, "cuda", (64, 128, 256, 512), 60, rows=8192, compile=True)
SMALL = Plan(TINY, "cpu", (4, 8), 12, rows=32, compile=False)
CAPTURE_REACH, ONLINE_REACH = 2.2e6, 0.75e6
CACHED_REACH = 1.2e6


# ---- the cases ---------------------------------------------------------------------------------------------


def capture_case(bench: Bench, positions: str, batch_rows: int) -> tuple[float, float | None]:
    """Tokens a second of the second shard; the first one warms up."""
    settings = bench.teacher.settings.model_copy(update={"batch_rows": batch_rows})
    teacher = replace(bench.teacher, settings=settings)
    capture = open_bench(replace(bench, teacher=teacher), TargetSettings.model_validate({"positions": positions}))
    for blocks in bench.blocks:
        start = time.perf_counter()
        receipt = make_targets(bench.store, blocks.ref, capture, force=True)
        seconds = time.perf_counter() - start
    return receipt.tokens / seconds, None


def train_case(plan: Plan, bench: Bench, source: str, positions: str, batch_rows: int) -> tuple[float, float | None]:
    """Tokens a second, and the share of waiting, by the trainer's own metrics."""
    recipe = _recipe(plan, bench, source, positions, batch_rows)
    parts, codec = cached(bench, recipe.targets) if source == "cached" else (bench.parts, None)
    run = make_run(recipe, manifest=parts, heldout=(), teacher_fingerprint="random", start="", counts="")
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    student.to(bench.teacher.device)  # type: ignore[arg-type]
    supervision = CachedTeacher(bench.teacher, codec, run.loss) if codec else OnlineTeacher(bench.teacher, run.loss)
    built = TrainingSetup(student, bench.teacher.vocabulary, supervision, None)
    trainer = Trainer(
        run, bench.store, built, make_optimizer(student, run.train), Ranks(), None, torch.device(plan.device)
    )
    trainer.loop(TrainingProgress(), StopSignal())
    lines = read_metrics(Path(run.folder) / "metrics.jsonl")[WARM_LINES:]
    seconds = sum(line["seconds"] for line in lines)
    tokens = sum(line["seconds"] * line["tokens_per_second"] for line in lines)
    return tokens / seconds, sum(line["seconds"] * line["data_wait"] for line in lines) / seconds


def reference_case(plan: Plan, bench: Bench, batch_rows: int) -> tuple[float, float | None]:
    """Tokens a second of the reference step in bf16."""
    device = torch.device(plan.device)
    batch = reference_batch(first_batch(bench, TargetSettings(), bench.parts, batch_rows).to(device))
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    student.to(device).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    warm = plan.steps // LINES
    for number in range(plan.steps):
        if number == warm:
            synchronize(device)
            start = time.perf_counter()
        reference_step(bench.teacher.model, student, optimizer, batch, LossSettings(), torch.bfloat16)
    synchronize(device)
    return (plan.steps - warm) * batch.input_ids.numel() / (time.perf_counter() - start), None


# ---- the suite ---------------------------------------------------------------------------------------------


def measure(plan: Plan, folder: Path) -> tuple[list[Case], float]:
    """All cases over all batch sizes, and the matrix rate that MFU is against."""
    device = torch.device(plan.device)
    # On a CPU, where this only shows that the suite runs, bf16 may be emulated.
    rate = matrix_rate(device) if device.type == "cuda" else matrix_rate(device, 512, torch.float32)
    bench = random_bench(folder, plan.size, plan.rows, plan.device)
    cases = []
    for name, work, reach in _works(plan, bench):
        flops = case_flops(plan.size, name)
        cases += [_one(plan, name, work, rows, flops / rate, reach) for rows in plan.batches]
    return cases, rate


def _works(plan: Plan, bench: Bench) -> list[tuple[str, Callable[[int], tuple[float, float | None]], float | None]]:
    """Name, work for a number of rows, and tokens a second to reach."""
    return [
        ("capture masked", lambda rows: capture_case(bench, "masked", rows), CAPTURE_REACH),
        ("capture all", lambda rows: capture_case(bench, "all", rows), None),
        ("cached masked", lambda rows: train_case(plan, bench, "cached", "masked", rows), CACHED_REACH),
        ("cached all", lambda rows: train_case(plan, bench, "cached", "all", rows), None),
        ("online masked", lambda rows: train_case(plan, bench, "online", "masked", rows), ONLINE_REACH),
        ("online all", lambda rows: train_case(plan, bench, "online", "all", rows), None),
        ("reference", lambda rows: reference_case(plan, bench, rows), None),
    ]


def _one(
    plan: Plan,
    name: str,
    work: Callable[[int], tuple[float, float | None]],
    rows: int,
    seconds_at_full_rate: float,
    reach: float | None,
) -> Case:
    """One case at one batch size; a batch that does not fit is a line without figures."""
    on_gpu = plan.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        speed, waited = work(rows)
    except torch.OutOfMemoryError:
        return Case(name, rows, reach=reach)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    print(f"{name}, {rows} rows: {speed:,.0f} tokens/s", flush=True)
    return Case(name, rows, speed, speed * seconds_at_full_rate, peak, waited, reach)


def _recipe(plan: Plan, bench: Bench, source: str, positions: str, batch_rows: int) -> Recipe:
    values: dict[str, Any] = {
        "name": "benchmark",
        "home": str(Path(bench.store.root).parent / f"{source}-{positions}-{batch_rows}"),
        "store": bench.store.root,
        "corpus": {"url": "unused"},
        "blocks": BlockSettings(length=bench.length).model_dump(),
        "mask": MaskSettings().model_dump(),
        "teacher": TeacherSettings(model="random").model_dump(),
        "targets": {"source": source, "positions": positions},
        "student": {"layers": bench.layers},
        "train": {
            "batch_rows": batch_rows,
            "max_steps": plan.steps,
            "log_steps": plan.steps // LINES,
            "checkpoint_steps": 10**6,
            "validate_steps": 0,
            "compile": plan.compile,
            "device": plan.device,
        },
    }
    return make_recipe(values, "benchmark")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--batches", type=int, nargs="+", help="blocks in a step")
    parser.add_argument("--steps", type=int, help="steps of each training")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    plan = SMALL if given.tiny else FULL
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny shows that the suite runs")
    plan = replace(plan, batches=tuple(given.batches or plan.batches), steps=given.steps or plan.steps)
    with tempfile.TemporaryDirectory() as folder:
        cases, rate = measure(plan, Path(folder))
    facts = facts_of(
        plan.device,
        model=f"{plan.size.name}, block {plan.size.length}, random weights",
        matrix_rate=f"{rate / 1e12:.3g} TFLOP/s",
    )
    name = "tiny" if given.tiny else "gpu"
    publish(Report(name, "One GPU", facts, cases, notes_of(__doc__)), given.results, plan.device)


if __name__ == "__main__":
    main()
