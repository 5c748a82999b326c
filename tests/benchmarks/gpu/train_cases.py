"""Cases of training: the loop of tasks.train at several batch sizes, the reference's step, and a checkpoint.

The loop runs with its own loader and metrics but without checkpoints. Throughput is that of the metrics' middle lines:
the first ones contain compilation and first allocations, the last one is left for the profiler.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.models.student import make_student
from tasks.recipe.config import BlockSettings, LossSettings, MaskSettings, Recipe, TargetSettings, TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import METRICS, make_run
from tasks.train.checkpoint import TrainingProgress, save_checkpoint
from tasks.train.flops import synchronize
from tasks.train.metrics import read_metrics
from tasks.train.optimizer import make_optimizer
from tasks.train.process import StopSignal
from tasks.train.setup import TrainingSetup
from tasks.train.step import Ranks
from tasks.train.teacher_signal import CachedTeacher, OnlineTeacher
from tasks.train.trainer import Trainer
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.profiling import profiled_steps
from tests.benchmarks.gpu.workload import make_bench, record_speed, rows_per_step
from tests.benchmarks.reference import reference_batch, reference_step
from tests.benchmarks.synthetic import Bench, cache_targets, first_batch

LINES = 7
"""Lines of metrics of one training; its steps are a multiple."""
WARM_UP_LINES = 2
PROFILED_LINES = 1
PROFILED_ROWS = 256
STEPS = 49
TINY_STEPS = 14
LINE_FIELDS = ("step", "loss", "grad_norm", "tokens_per_second", "seconds", "data_wait", "mfu")


def train(context: Context, source: str, positions: str, batch_rows: int) -> None:
    """Throughput, MFU, share of waiting for data and compile time of one training.

    Its figures are recorded before the profile is written, so that they do not depend on the profiler.
    """
    bench, steps = make_bench(context), TINY_STEPS if context.tiny else STEPS
    rows = rows_per_step(context, batch_rows)
    with _profiler(context, f"{source} {positions}", batch_rows, steps // LINES):
        start = time.perf_counter()
        lines = run_training(context, bench, source, positions, rows, steps, compile_encoder=not context.tiny)
        context.record("training_seconds", time.perf_counter() - start)
        context.record("lines", [{name: line[name] for name in LINE_FIELDS if name in line} for line in lines])
        tokens_per_second, data_wait, seconds_per_line = _means(lines)
        context.record("data_wait", data_wait)
        context.record("compile_seconds", max(0.0, lines[0]["seconds"] - seconds_per_line))
        context.record("compiled_graphs", _compiled_graphs())
        record_speed(context, tokens_per_second, source, positions)


def _profiler(context: Context, title: str, batch_rows: int, log_steps: int) -> AbstractContextManager[None]:
    """Profiles a few steps of the last line of metrics, at one batch size only."""
    if batch_rows != PROFILED_ROWS:
        return nullcontext()
    first = (LINES - PROFILED_LINES) * log_steps + 1
    return profiled_steps(context, f"{title}, {batch_rows} blocks per step", first, count=min(3, log_steps - 1))


def smoke(context: Context) -> None:
    """Tokens per second of a few eager steps from cached and live targets: shows that each source works."""
    bench = make_bench(context, rows=1024)
    for source, positions in (("cached", "masked"), ("cached", "all"), ("online", "masked")):
        rows = rows_per_step(context, 32)
        lines = run_training(context, bench, source, positions, rows, TINY_STEPS, compile_encoder=False)
        context.record(f"{source} {positions}, tokens per second", _means(lines)[0])
        context.record(f"{source} {positions}, loss", [line["loss"] for line in lines])


def run_training(
    context: Context, bench: Bench, source: str, positions: str, rows: int, steps: int, *, compile_encoder: bool
) -> list[dict[str, Any]]:
    """Trains and returns the lines of metrics."""
    recipe = make_benchmark_recipe(context, bench, source, positions, rows, steps, compile_encoder)
    parts, codec = cache_targets(bench, recipe.targets) if source == "cached" else (bench.parts, None)
    run = make_run(recipe, manifest=parts, heldout=(), teacher_fingerprint="random", start="", counts="")
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    nn.Module.to(student, context.device)
    signals = CachedTeacher(bench.teacher, codec, run.loss) if codec else OnlineTeacher(bench.teacher, run.loss)
    setup = TrainingSetup(student, bench.teacher.vocabulary, signals, None)
    optimizer = make_optimizer(student, run.train)
    trainer = Trainer(run, bench.store, setup, optimizer, Ranks(), None, torch.device(context.device))
    trainer.loop(TrainingProgress(), StopSignal())
    return read_metrics(Path(run.folder) / METRICS)


def make_benchmark_recipe(
    context: Context, bench: Bench, source: str, positions: str, rows: int, steps: int, compile_encoder: bool
) -> Recipe:
    """A recipe with default settings, without validation and checkpoints."""
    values: dict[str, Any] = {
        "name": "benchmark",
        "home": str(context.work / f"{source}-{positions}-{rows}-{steps}"),
        "store": bench.store.root,
        "corpus": {"url": "unused"},
        "blocks": BlockSettings(length=bench.length).model_dump(),
        "mask": MaskSettings().model_dump(),
        "teacher": TeacherSettings(model="random").model_dump(),
        "targets": {"source": source, "positions": positions},
        "student": {"layers": bench.layers},
        "train": {
            "batch_rows": rows,
            "max_steps": steps,
            "log_steps": steps // LINES,
            "checkpoint_steps": 10**6,
            "validate_steps": 0,
            "compile": compile_encoder,
            "device": context.device,
        },
    }
    return make_recipe(values, "benchmark")


def reference(context: Context, batch_rows: int) -> None:
    """Throughput of tests/benchmarks/reference.py under bf16 autocast, its batch already on the device."""
    bench, device = make_bench(context), torch.device(context.device)
    rows, steps, warm_up = rows_per_step(context, batch_rows), 12 if context.tiny else 24, 4
    batch = reference_batch(first_batch(bench, TargetSettings(), bench.parts, rows).to(device))
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    nn.Module.to(student, device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for step in range(steps):
        if step == warm_up:
            synchronize(device)
            start = time.perf_counter()
        reference_step(bench.teacher.model, student, optimizer, batch, LossSettings(), torch.bfloat16)
    synchronize(device)
    tokens = (steps - warm_up) * batch.input_ids.numel()
    record_speed(context, tokens / (time.perf_counter() - start), "reference")


def checkpoint(context: Context) -> None:
    """Seconds and bytes of one checkpoint at this size, after one optimizer step."""
    bench = make_bench(context, rows=1024)
    recipe = make_benchmark_recipe(context, bench, "online", "masked", rows_per_step(context, 32), TINY_STEPS, False)
    run = make_run(recipe, manifest=bench.parts, heldout=(), teacher_fingerprint="random", start="", counts="")
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    nn.Module.to(student, context.device)
    optimizer = make_optimizer(student, run.train)
    torch.stack([parameter.sum() for parameter in student.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    seconds = []
    for step in (1, 2, 3):
        start = time.perf_counter()
        receipt = save_checkpoint(bench.store, run, student, optimizer, TrainingProgress(step=step))
        seconds.append(time.perf_counter() - start)
    context.record("checkpoint_mb", sum(file.size for file in receipt.files) / 1e6)
    context.record("seconds_of_each", seconds)
    context.record("seconds_per_checkpoint", sorted(seconds)[1])


def _means(lines: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Tokens per second, share of waiting for data and seconds per line, over the lines that count."""
    counted = lines[WARM_UP_LINES : LINES - PROFILED_LINES]
    seconds = sum(line["seconds"] for line in counted)
    tokens = sum(line["seconds"] * line["tokens_per_second"] for line in counted)
    waited = sum(line["seconds"] * line["data_wait"] for line in counted)
    return tokens / seconds, waited / seconds, seconds / len(counted)


def _compiled_graphs() -> dict[str, int]:
    """Graphs that torch.compile made in this process, and the breaks between them."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
