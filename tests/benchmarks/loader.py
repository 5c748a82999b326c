"""How many times faster batches are prepared than a train step eats them, and how many cores a fast GPU would need.

    python -m tests.benchmarks.loader

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

A batch is prepared when its blocks are masked, the teacher's vectors are read and checked against their digests, and
all of it is decoded (which the trainer does on its device). The step is that of the demo teacher's student on this
CPU. The lines at the size of camembert-base (blocks of 512, width 768, random ids) have no step on a CPU beside them:
they are compared with the 1.2 million tokens a second that one H200 is to train, and the ratio is what one core of
this machine can feed.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tasks.loader.batch import make_batch
from tasks.loader.dataset import BlockDataset as Reader
from tasks.recipe.config import TargetSettings
from tasks.recipe.run_spec import Part
from tasks.targets.codec import Codec
from tests.benchmarks.results import CORPUS, RESULTS, TEACHER, Report, Row, facts_of, least_cpu, notes_of, publish
from tests.benchmarks.step import our_step
from tests.benchmarks.synthetic import Bench, Size, cached, masking_of, random_bench, real_bench

TRIES = 5
REACH = 3.0
GPU_TOKENS = 1.2e6
WIDE = Size("block 512, width 768", 1, 1, 768, 12, 64, 32_005, 512)
"""As wide as camembert-base, of one thin layer: the loader does not know how deep the teacher was."""


class Preparation:
    """Prepares batches of a manifest, the next rows with every call, round and round."""

    def __init__(self, bench: Bench, targets: TargetSettings, parts: tuple[Part, ...], codec: Codec, rows: int) -> None:
        self.reader = Reader(bench.store, parts, cached=True)
        self.masking = masking_of(bench, targets)
        self.codec, self.rows, self.parts = codec, rows, parts
        self.order = np.random.default_rng(0).permutation(
            [(p, r) for p, part in enumerate(parts) for r in range(part.rows)]
        )
        self.at = 0

    def __call__(self, decode: bool = True) -> int:
        """One batch; its tokens."""
        chosen = self.order[np.arange(self.at, self.at + self.rows) % len(self.order)]
        self.at += self.rows
        batch = make_batch(self.reader, self.masking, chosen[:, 0], chosen[:, 1], np.zeros(self.rows, np.int64))
        if decode and batch.payload is not None:
            self.codec.decode(batch.payload.flatten(0, 1))
        return batch.tokens


def against_step(bench: Bench, positions: str, rows: int, tries: int = TRIES) -> Row:
    """Preparation beside the step, in tokens a CPU second."""
    targets = TargetSettings.model_validate({"positions": positions})
    prepare = Preparation(bench, targets, *cached(bench, targets), rows)
    step = our_step(bench, positions, rows)
    prepare()  # opens and hashes the files
    preparing, stepping = least_cpu([prepare, step.run], tries)
    ours, eaten = step.tokens / preparing, step.tokens / stepping
    return Row(
        f"{positions} positions, against the step: {bench.name}", "tokens/CPU-s", ours, eaten, ours / eaten, REACH
    )


def against_gpu(bench: Bench, positions: str, rows: int, tries: int = TRIES) -> Row:
    """Preparation at the size of camembert-base; decoding is the GPU's."""
    targets = TargetSettings.model_validate({"positions": positions})
    prepare = Preparation(bench, targets, *cached(bench, targets), rows)
    tokens = prepare()
    (seconds,) = least_cpu([partial(prepare, decode=False)], tries)
    ours = tokens / seconds
    return Row(
        f"{positions} positions, against an H200: {bench.name}", "tokens/CPU-s", ours, GPU_TOKENS, ours / GPU_TOKENS
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = real_bench(Path(folder) / "demo", TEACHER, CORPUS, length=128, layers=2)
        wide = random_bench(Path(folder) / "wide", WIDE, 128, "cpu", shards=2)
        rows = [against_step(demo, positions, 16) for positions in ("masked", "all")]
        rows += [against_gpu(wide, positions, 256) for positions in ("masked", "all")]
    publish(Report("loader", "Batches against the step", facts_of(), rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
