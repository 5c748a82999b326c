"""Cost of an unchanged shard when a finished run is started again.

    python -m tests.benchmarks.rerun                     2,000 shards
    python -m tests.benchmarks.rerun --shards 20000

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

The store holds receipts and data of 20 sources, their shards, blocks and targets under a recipe's keys, each a file of
a few bytes. `prepare_corpus` of flows.pipeline then runs as in every flow; it needs no server. CPU time is that of the
best of several runs; bytes written are those of all files in the store that a run created or changed.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

from flows.pipeline.preparation import Prepared, prepare_corpus
from storage.store import Store
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tests.benchmarks.paper import SOURCES, make_paper, recipe_of
from tests.benchmarks.results import RESULTS, Report, Row, facts_of, least_cpu, notes_of, publish

TRIES = 3
LIMIT_MILLISECONDS = 5.0


def stamps(store: Store) -> dict[str, tuple[int, int, int]]:
    """Inode, size and modification time of every file."""
    found = {}
    for folder, _, names in os.walk(store.root):
        for name in names:
            stat = os.stat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def measure(folder: Path, shards: int, tries: int = TRIES) -> list[Row]:
    """CPU milliseconds per unchanged shard, and bytes written by all runs."""
    make_paper(folder, folder / "store", shards)
    store, recipe = Store(folder / "store"), recipe_of(folder, str(folder / "store"))
    before = stamps(store)
    (seconds,) = least_cpu([partial(_nothing_to_do, store, recipe)], tries)
    after = stamps(store)
    written = sum(stamp[1] for path, stamp in after.items() if before.get(path) != stamp)
    spent = 1000 * seconds / shards
    return [
        Row(
            "an unchanged shard, from source to targets",
            "CPU-ms",
            spent,
            LIMIT_MILLISECONDS,
            LIMIT_MILLISECONDS / spent,
            1.0,
        ),
        Row(f"written by {tries} runs over {shards:,} unchanged shards", "bytes", float(written), 0.0),
    ]


def _nothing_to_do(store: Store, recipe: Recipe) -> None:
    prepared: Prepared = prepare_corpus(Workspace(store, recipe))
    assert not prepared.stages, prepared.stages


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.shards)
    facts = facts_of(shards=f"{given.shards:,} of {SOURCES} sources, local store")
    publish(Report("rerun", "A run over unchanged shards", facts, rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
