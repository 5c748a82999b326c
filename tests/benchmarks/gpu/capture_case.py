"""Case of capture: make_targets of tasks.targets.compute, from blocks on disk to targets on disk."""

import time
from dataclasses import replace

from tasks.recipe.config import TargetSettings
from tasks.targets.compute import make_targets
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.workload import make_bench, record_speed, rows_per_step
from tests.benchmarks.synthetic import calibrated_capture


def capture(context: Context, positions: str, batch_rows: int) -> None:
    """Tokens per second of the second shard; the first one warms up."""
    bench = make_bench(context)
    settings = bench.teacher.settings.model_copy(update={"batch_rows": rows_per_step(context, batch_rows)})
    teacher = replace(bench.teacher, settings=settings)
    capturing = calibrated_capture(
        replace(bench, teacher=teacher), TargetSettings.model_validate({"positions": positions})
    )
    for blocks in bench.blocks:
        start = time.perf_counter()
        receipt = make_targets(bench.store, blocks.ref, capturing, force=True)
        seconds = time.perf_counter() - start
        context.record("shard_seconds", seconds)
    record_speed(context, receipt.tokens / seconds, "capture", positions)
