"""Speed of batch preparation, compared with the train step that consumes the batches and with a fast GPU.

    python -m tests.benchmarks.loader

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

Preparing a batch means masking its blocks, reading the encoded hidden states, checking the digests of the rows and
decoding (which the trainer does on its device). The train step is that of the demo teacher's student on this CPU. Rows
at the size of camembert-base (blocks of 512, width 768, random ids) are compared with 1.2 million tokens per second,
the goal for training on one H200; their ratio is the number of such GPUs that one core of this machine can feed.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tasks.loader.batch import make_batch
from tasks.loader.dataset import BlockDataset
from tasks.recipe.config import TargetSettings
from tasks.recipe.run_json import Part
from tasks.targets.codec import Codec
from tests.benchmarks.results import CORPUS, RESULTS, TEACHER, Report, Row, facts_of, least_cpu, notes_of, publish
from tests.benchmarks.step import our_step
from tests.benchmarks.synthetic import Bench, Size, cache_targets, masking_rule, random_bench, real_bench

REPEATS = 5
TARGET_RATIO = 3.0
GPU_TOKENS_PER_SECOND = 1.2e6
WIDE = Size("block 512, width 768", 1, 1, 768, 12, 64, 32_005, 512)
"""As wide as camembert-base, with one thin layer: the loader's work does not depend on the teacher's depth."""


class Preparation:
    """Prepares batches of a manifest: each call takes the next rows, and starts over after the last one."""

    def __init__(self, bench: Bench, targets: TargetSettings, parts: tuple[Part, ...], codec: Codec, rows: int) -> None:
        self.dataset = BlockDataset(bench.store, parts, cached=True)
        self.masking = masking_rule(bench, targets)
        self.codec, self.rows, self.parts = codec, rows, parts
        self.order = np.random.default_rng(0).permutation(
            [(p, r) for p, part in enumerate(parts) for r in range(part.rows)]
        )
        self.next = 0

    def __call__(self, decode: bool = True) -> int:
        """Prepares one batch; returns its number of tokens."""
        chosen = self.order[np.arange(self.next, self.next + self.rows) % len(self.order)]
        self.next += self.rows
        batch = make_batch(self.dataset, self.masking, chosen[:, 0], chosen[:, 1], np.zeros(self.rows, np.int64))
        if decode and batch.payload is not None:
            self.codec.decode(batch.payload.flatten(0, 1))
        return batch.tokens


def compare_with_step(bench: Bench, positions: str, rows: int, repeats: int = REPEATS) -> Row:
    """Tokens per CPU second of preparation and of the train step."""
    targets = TargetSettings.model_validate({"positions": positions})
    prepare = Preparation(bench, targets, *cache_targets(bench, targets), rows)
    step = our_step(bench, positions, rows)
    prepare()  # opens and hashes the files
    preparing, stepping = least_cpu([prepare, step.run], repeats)
    prepared, consumed = step.tokens / preparing, step.tokens / stepping
    name = f"{positions} positions, compared with the step: {bench.name}"
    return Row(name, "tokens/CPU-s", prepared, consumed, prepared / consumed, TARGET_RATIO)


def compare_with_gpu(bench: Bench, positions: str, rows: int, repeats: int = REPEATS) -> Row:
    """Tokens per CPU second of preparation without decoding, which is the GPU's work, and the GPU's own rate."""
    targets = TargetSettings.model_validate({"positions": positions})
    prepare = Preparation(bench, targets, *cache_targets(bench, targets), rows)
    tokens = prepare()
    (seconds,) = least_cpu([partial(prepare, decode=False)], repeats)
    prepared = tokens / seconds
    name = f"{positions} positions, compared with an H200: {bench.name}"
    return Row(name, "tokens/CPU-s", prepared, GPU_TOKENS_PER_SECOND, prepared / GPU_TOKENS_PER_SECOND)


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = real_bench(Path(folder) / "demo", TEACHER, CORPUS, length=128, layers=2)
        wide = random_bench(Path(folder) / "wide", WIDE, 128, "cpu", shards=2)
        rows = [compare_with_step(demo, positions, 16) for positions in ("masked", "all")]
        rows += [compare_with_gpu(wide, positions, 256) for positions in ("masked", "all")]
    publish(Report("loader", "Batch preparation", facts_of(), rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
