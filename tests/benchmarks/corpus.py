"""Speed of sharding and tokenizing, compared with decompression, parsing and tokenizer alone, in one and two processes.

    python -m tests.benchmarks.corpus                                                  the bundled corpus and tokenizer
    python -m tests.benchmarks.corpus --corpus FOLDER --tokenizer FOLDER --sources 2   .jsonl.zst sources of your own

Needs the project installed with its extra `test`. Prints a table and writes it into tests/benchmarks/results/.

Shards are compared with decompressing the same bytes at once and parsing every line, and nothing else: by the standard
library's json (which the target refers to) and by orjson (which the reader uses). Sharding also computes SHA-256 of
source, documents and files, checks UTF-8, filters, removes duplicates, writes Arrow and calls fsync. Blocks are
compared with `Tokenizer.encode_batch` in its default configuration, and with `encode_batch_fast` and the larger word
cache that ours uses; both discard the ids. MB are of UTF-8 text (blocks) and of decompressed JSON (shards), per CPU
second, the best of several alternating rounds. Two processes: CPU time of each while both are busy, which shows the
cost of shared caches and memory.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import orjson
import zstandard
from tokenizers import Tokenizer

from storage.arrow import TEXT_FILE, open_arrow
from storage.artifact import Receipt
from storage.store import Store
from tasks.corpus.shard import shard_source, shards_of
from tasks.corpus.snapshot import Source, take_snapshot
from tasks.recipe.config import BlockSettings, CorpusSettings
from tasks.tokens.blocks import make_blocks
from tasks.tokens.vocabulary import Vocabulary, load_tokenizer, load_vocabulary
from tests.benchmarks.results import (
    CORPUS,
    RESULTS,
    TEACHER,
    Report,
    Row,
    facts_of,
    least_cpu,
    notes_of,
    publish,
    shown,
)

REPEATS = 5
JOBS = 6
SHARD_BYTES = 4_000_000
"""Small shards, so that one of them is tokenized in seconds."""
BATCH = 256
"""Documents per call of encode_batch: about as much text per call as tasks.tokens passes."""


@dataclass(frozen=True)
class Place:
    """Sources, and a folder with an initially empty store."""

    sources: tuple[Source, ...]
    settings: CorpusSettings
    vocabulary: Vocabulary
    folder: Path

    def store(self) -> Store:
        """The store in the folder."""
        return Store(self.folder / "store")

    def clear(self) -> None:
        """Empties the store: existing artifacts would not be computed again."""
        shutil.rmtree(self.folder / "store", ignore_errors=True)


# ---- shards ------------------------------------------------------------------------------------------------


def parse(source: Source, loads: Callable[[bytes], object]) -> int:
    """Decompresses a source in memory and parses every line: a lower bound. Returns the decompressed bytes."""
    with open(source.url, "rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    for line in data.split(b"\n"):
        if line:
            loads(line)
    return len(data)


def shard_all(place: Place) -> list[Receipt]:
    """Shards every source into an empty store."""
    place.clear()
    return [shard_source(place.store(), source, place.settings) for source in place.sources]


def shard_rows(place: Place, repeats: int = REPEATS) -> list[Row]:
    """MB of decompressed JSON per CPU second: sharding, compared with both parsers."""
    megabytes = sum(parse(source, orjson.loads) for source in place.sources) / 1e6
    runs: list[Callable[[], object]] = [partial(shard_all, place)]
    runs += [partial(_parse_all, place, loads) for loads in (json.loads, orjson.loads)]
    ours, *limits = (megabytes / seconds for seconds in least_cpu(runs, repeats))
    names = ("shard, compared with zstd + json", "shard, compared with zstd + orjson")
    targets = (0.6, None)
    return [
        Row(name, "MB/CPU-s", ours, limit, ours / limit, target)
        for name, limit, target in zip(names, limits, targets, strict=True)
    ]


def _parse_all(place: Place, loads: Callable[[bytes], object]) -> None:
    for source in place.sources:
        parse(source, loads)


def small(place: Place) -> Place:
    """The same sources in small shards."""
    return replace(place, settings=place.settings.model_copy(update={"shard_bytes": SHARD_BYTES}))


# ---- blocks ------------------------------------------------------------------------------------------------


def block_rows(place: Place, repeats: int = REPEATS) -> list[Row]:
    """MB of text per CPU second, over the first shard of the first source, compared with the tokenizer alone."""
    place = small(place)
    store, shard = place.store(), shards_of(shard_all(place)[0])[0]
    texts = open_arrow(store.local_folder(store.receipt(shard)) / TEXT_FILE).read_all().column("text").to_pylist()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    plain = Tokenizer.from_file(str(Path(place.vocabulary.folder) / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    fast = load_tokenizer(place.vocabulary)
    runs: list[Callable[[], object]] = [
        partial(make_blocks, store, shard, BlockSettings(), place.vocabulary, force=True)
    ]
    runs += [partial(_encode, encode, texts) for encode in (plain.encode_batch, fast.encode_batch_fast)]
    ours, *limits = (megabytes / seconds for seconds in least_cpu(runs, repeats))
    return [
        Row("blocks, compared with encode_batch", "MB/CPU-s", ours, limits[0], ours / limits[0], 0.9),
        Row("blocks, compared with encode_batch_fast, larger cache", "MB/CPU-s", ours, limits[1], ours / limits[1]),
    ]


def _encode(encode: Callable[..., object], texts: Sequence[str]) -> None:
    for start in range(0, len(texts), BATCH):
        encode(texts[start : start + BATCH], add_special_tokens=False)


# ---- two processes -----------------------------------------------------------------------------------------


def chain(place: Place, number: int) -> float:
    """Shards one source and makes the blocks of its first shard, in a store of its own; returns CPU seconds."""
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=place.folder) as home:
        store = Store(Path(home))
        receipt = shard_source(store, place.sources[number % len(place.sources)], place.settings)
        make_blocks(store, shards_of(receipt)[0], BlockSettings(), place.vocabulary)
    return time.process_time() - start


def scaling_row(place: Place, jobs: int = JOBS) -> Row:
    """Sources per CPU second of each of two busy worker processes, compared with a single one."""
    place, speeds = small(place), []
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(
                pool.map(partial(chain, place), range(processes))
            )  # warm-up: starts the processes, loads the tokenizer
            speeds.append(jobs / sum(pool.map(partial(chain, place), [0] * jobs)))
    one, two = speeds
    return Row("shard + blocks, each of two processes compared with one", "sources/CPU-s", two, one, two / one)


def measure(place: Place) -> list[Row]:
    """Every row of the table."""
    return [*shard_rows(place), *block_rows(place), scaling_row(place)]


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of .jsonl.zst sources")
    parser.add_argument("--tokenizer", type=Path, default=TEACHER, help="folder of the tokenizer")
    parser.add_argument("--sources", type=int, default=1, help="number of sources to measure")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    settings = CorpusSettings(url=str(given.corpus), pattern="*.jsonl.zst")
    with tempfile.TemporaryDirectory() as folder:
        sources = take_snapshot(settings).sources[: given.sources]
        rows = measure(Place(sources, settings, load_vocabulary(str(given.tokenizer)), Path(folder)))
    megabytes = sum(source.size for source in sources) / 1e6
    facts = facts_of(
        corpus=f"{shown(given.corpus)}, {len(sources)} sources, {megabytes:.1f} MB compressed",
        tokenizer=shown(given.tokenizer),
    )
    publish(Report("corpus", "Shards and blocks", facts, rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
