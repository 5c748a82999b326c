"""Speed and memory of our train step on a CPU, compared with the reference trainer's step.

    python -m tests.benchmarks.step             the demo teacher, and a random one of 4 layers of width 128

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

Both take the same batch (same blocks, same masks), the same student and the same optimizer, from forward to weight
update, in float32 without dropout. Ours decodes the teacher's hidden states from the int8 cache; the reference
(tests/benchmarks/reference.py) runs the teacher and computes the logits of every attended row. Speed counts all tokens
of the batch per CPU second, the best of several alternating rounds. Memory is the peak of the tensors that a step
allocates, gradients included, weights and optimizer state not (MB, smaller is better).
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.loader.batch import Batch
from tasks.models.student import make_student
from tasks.recipe.config import LossSettings, TargetSettings, TrainSettings
from tasks.train.optimizer import make_optimizer
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import CachedTeacher, SignalSource
from tests.benchmarks.reference import reference_batch, reference_step
from tests.benchmarks.results import CORPUS, RESULTS, TEACHER, Report, Row, facts_of, least_cpu, notes_of, publish
from tests.benchmarks.synthetic import SMALL, Bench, cache_targets, first_batch, random_bench, real_bench
from tests.harness.live_tensors import peak_of

REPEATS = 5
TARGET_RATIO = {"all": 2.0, "masked": 6.0}


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step that can be repeated, and the tokens it consumes."""

    run: Callable[[], object]
    tokens: int


def our_step(bench: Bench, positions: str, rows: int) -> Step:
    """A step of tasks.train from cached int8 targets."""
    targets = TargetSettings.model_validate({"positions": positions})
    parts, codec = cache_targets(bench, targets)
    batch = first_batch(bench, targets, parts, rows)
    student, optimizer = _student_and_optimizer(bench)
    module = StudentWithLoss(student, LossSettings(), compile_encoder=False).train()
    signals = CachedTeacher(bench.teacher, codec, LossSettings())
    return Step(partial(train_step, module, signals, optimizer, batch), batch.tokens)


def train_step(module: nn.Module, signals: SignalSource, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Gradient step, clipping and weight update as in the loop of tasks.train; returns the loss."""
    counts = sum_counts([batch], False, Ranks())
    parts = gradient_step(module, signals, [batch], counts, Ranks(), None)
    nn.utils.clip_grad_norm_(module.parameters(), TrainSettings().clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(parts[0])


def reference_trainer_step(bench: Bench, rows: int) -> Step:
    """A step of the reference over all attended positions."""
    batch = first_batch(bench, TargetSettings(), bench.parts, rows)
    student, optimizer = _student_and_optimizer(bench)
    run = partial(
        reference_step,
        bench.teacher.model,
        student.train(),
        optimizer,
        reference_batch(batch),
        LossSettings(),
        autocast=None,
    )
    return Step(run, batch.tokens)


def _student_and_optimizer(bench: Bench) -> tuple[Any, torch.optim.Optimizer]:
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    return student, make_optimizer(student, TrainSettings())


def step_rows(bench: Bench, rows: int, repeats: int = REPEATS) -> list[Row]:
    """Speed and memory with loss on all and on masked positions, compared with the reference."""
    theirs = reference_trainer_step(bench, rows)
    ours = {positions: our_step(bench, positions, rows) for positions in TARGET_RATIO}
    reference, *seconds = least_cpu([theirs.run, *(step.run for step in ours.values())], repeats)
    memory = peak_of(theirs.run) / 1e6
    found = []
    for (positions, step), spent in zip(ours.items(), seconds, strict=True):
        speed, limit = step.tokens / spent, theirs.tokens / reference
        found.append(
            Row(
                f"{positions} positions: {bench.name}",
                "tokens/CPU-s",
                speed,
                limit,
                speed / limit,
                TARGET_RATIO[positions],
            )
        )
        own = peak_of(step.run) / 1e6
        found.append(Row(f"{positions} positions: memory", "MB", own, memory, memory / own))
    return found


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16, help="blocks of 128 tokens per step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = real_bench(Path(folder) / "demo", TEACHER, CORPUS, length=128, layers=2)
        small = random_bench(Path(folder) / "small", SMALL, given.rows, "cpu", shards=1)
        rows = [row for bench in (demo, small) for row in step_rows(bench, given.rows)]
    facts = facts_of(batch=f"{given.rows} blocks of 128 tokens, float32, loss weights 0.5 / 0.3 / 0.2 at temperature 2")
    publish(Report("step", "Train step on a CPU", facts, rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
