"""Teacher, blocks and settings of the throughput cases: camembert-base size on a GPU, a tiny model on a CPU.

    bench = make_bench(context)
    record_speed(context, tokens_per_second, "cached", "masked")

Weights and token ids are random: speed does not depend on them. Blocks and targets stay in the session's work folder,
so a later case reuses them.
"""

from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.flops import case_flops, measured_matrix_rate
from tests.benchmarks.synthetic import CAMEMBERT, TINY, Bench, Size, random_bench

TINY_ROWS = 4
"""Blocks per step or forward in a tiny session, whatever the case's own number."""


def size_of(context: Context) -> Size:
    """The models' shape."""
    return TINY if context.tiny else CAMEMBERT


def make_bench(context: Context, rows: int = 4096) -> Bench:
    """Random teacher on the device, and two shards of `rows` blocks."""
    return random_bench(context.work, size_of(context), 32 if context.tiny else rows, context.device)


def rows_per_step(context: Context, rows: int) -> int:
    """Blocks per step."""
    return TINY_ROWS if context.tiny else rows


def record_speed(context: Context, tokens_per_second: float, kind: str, positions: str = "all") -> None:
    """Records throughput and model FLOP utilisation."""
    rate = measured_matrix_rate(context.device)
    context.record("tokens_per_second", tokens_per_second)
    context.record("mfu", tokens_per_second * case_flops(size_of(context), kind, positions) / rate)
    context.record("matrix_tflops", rate / 1e12)
