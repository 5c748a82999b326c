"""How many times faster our train step is than the reference's on a CPU, and how much memory each takes.

    python -m tests.benchmarks.step                     the demo teacher, and a random one of 4 layers of 128 to 2

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

Both take the same batch (same blocks, same masks), the same student and the same optimizer, forward to weight update,
in float32 without dropout. Ours reads the teacher from the int8 cache; the reference (tests/benchmarks/reference.py)
runs it and has the logits of every attended row. Tokens are all tokens of the batch, per CPU second, the best of
several rounds in turn. Memory is the peak of the tensors made during a step, gradients and all but weights and
optimizer (MB, smaller is better).
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

from tasks.models.student import make_student
from tasks.recipe.config import LossSettings, TargetSettings, TrainSettings
from tasks.train.optimizer import make_optimizer
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import CachedTeacher, SignalSource
from tests.benchmarks.reference import reference_batch, reference_step
from tests.benchmarks.results import CORPUS, RESULTS, TEACHER, Report, Row, facts_of, least_cpu, notes_of, publish
from tests.benchmarks.synthetic import SMALL, Bench, cached, first_batch, random_bench, real_bench
from tests.harness.live_tensors import peak_of

TRIES = 5
REACH = {"all": 2.0, "masked": 6.0}


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step that can be repeated, and the tokens that it eats."""

    run: Callable[[], object]
    tokens: int


def our_step(bench: Bench, positions: str, rows: int) -> Step:
    """Cached int8 targets, as tasks.train does it."""
    targets = TargetSettings.model_validate({"positions": positions})
    parts, codec = cached(bench, targets)
    batch = first_batch(bench, targets, parts, rows)
    student, optimizer = _learner(bench)
    distiller = StudentWithLoss(student, LossSettings(), compile_encoder=False).train()
    supervision = CachedTeacher(bench.teacher, codec, LossSettings())
    return Step(partial(train_step, distiller, supervision, optimizer, batch), batch.tokens)


def train_step(distiller: nn.Module, supervision: SignalSource, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """What tasks.train does between two batches; the loss."""
    sums = sum_counts([batch], False, Ranks())
    parts = gradient_step(distiller, supervision, [batch], sums, Ranks(), None)
    nn.utils.clip_grad_norm_(distiller.parameters(), TrainSettings().clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(parts[0])


def their_step(bench: Bench, rows: int) -> Step:
    """The reference over all attended positions."""
    batch = first_batch(bench, TargetSettings(), bench.parts, rows)
    student, optimizer = _learner(bench)
    work = partial(
        reference_step,
        bench.teacher.model,
        student.train(),
        optimizer,
        reference_batch(batch),
        LossSettings(),
        autocast=None,
    )
    return Step(work, batch.tokens)


def _learner(bench: Bench) -> tuple[Any, torch.optim.Optimizer]:
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    return student, make_optimizer(student, TrainSettings())


def step_rows(bench: Bench, rows: int, tries: int = TRIES) -> list[Row]:
    """Speed and memory of both kinds of positions beside the reference."""
    theirs = their_step(bench, rows)
    ours = {positions: our_step(bench, positions, rows) for positions in REACH}
    reference, *seconds = least_cpu([theirs.run, *(step.run for step in ours.values())], tries)
    memory = peak_of(theirs.run) / 1e6
    found = []
    for (positions, step), spent in zip(ours.items(), seconds, strict=True):
        speed, limit = step.tokens / spent, theirs.tokens / reference
        found.append(
            Row(f"{positions} positions: {bench.name}", "tokens/CPU-s", speed, limit, speed / limit, REACH[positions])
        )
        own = peak_of(step.run) / 1e6
        found.append(Row(f"{positions} positions: memory", "MB", own, memory, memory / own))
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16, help="blocks of 128 tokens in a step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = real_bench(Path(folder) / "demo", TEACHER, CORPUS, length=128, layers=2)
        small = random_bench(Path(folder) / "small", SMALL, given.rows, "cpu", shards=1)
        rows = [row for bench in (demo, small) for row in step_rows(bench, given.rows)]
    facts = facts_of(batch=f"{given.rows} blocks of 128 tokens, float32, loss 0.5 / 0.3 / 0.2 at temperature 2")
    publish(Report("step", "Train step on a CPU", facts, rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
