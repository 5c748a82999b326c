"""How near shards and blocks come to what their parts cost alone, in one process and in two.

    python -m tests.benchmarks.corpus                                                  the bundled corpus and tokenizer
    python -m tests.benchmarks.corpus --corpus FOLDER --tokenizer FOLDER --sources 2   .jsonl.zst sources of your own

Needs the project installed with its extra `test`. Prints a table and writes it into tests/benchmarks/results/.

Shards are compared with unpacking the same bytes at once and parsing every line, and nothing else: by the standard
library's json (what the target means) and by orjson (what the reader uses). Ours does besides: sha256 of source,
documents and files, UTF-8, filters, de-duplication, Arrow, fsync. Blocks are compared with `Tokenizer.encode_batch` as
it comes, and with `encode_batch_fast` and the larger word cache that ours uses; neither keeps a single id. MB are of
UTF-8 text (blocks) and of unpacked JSON (shards), per CPU second, the best of several rounds in turn. Two processes:
CPU time of what each of them does at once, so that what they lose to shared caches and memory shows.
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

from storage.arrow import read_table
from storage.artifact import Receipt
from storage.store import Store
from tasks.corpus.shard import FILE, shard_source, shards_of
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

TRIES = 5
JOBS = 6
SHARD_BYTES = 4_000_000
"""Small shards, so that one of them is tokenised in seconds."""
BATCH = 256
"""Documents that encode_batch gets at once: about as much text as ours gives it."""


@dataclass(frozen=True)
class Place:
    """Sources, and an empty store beside them."""

    sources: tuple[Source, ...]
    settings: CorpusSettings
    vocabulary: Vocabulary
    folder: Path

    def store(self) -> Store:
        """The store."""
        return Store(self.folder / "store")

    def clear(self) -> None:
        """Empties it: what is there would not be made again."""
        shutil.rmtree(self.folder / "store", ignore_errors=True)


# ---- shards ------------------------------------------------------------------------------------------------


def parse(source: Source, loads: Callable[[bytes], object]) -> int:
    """The limit, with all memory it likes: unpack the whole source, parse every line; returns the unpacked bytes."""
    with open(source.url, "rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    for line in data.split(b"\n"):
        if line:
            loads(line)
    return len(data)


def shard_all(place: Place) -> list[Receipt]:
    """Ours, into an empty store."""
    place.clear()
    return [shard_source(place.store(), source, place.settings) for source in place.sources]


def shard_rows(place: Place, tries: int = TRIES) -> list[Row]:
    """MB of unpacked JSON a CPU second: ours beside both parsers."""
    megabytes = sum(parse(source, orjson.loads) for source in place.sources) / 1e6
    works: list[Callable[[], object]] = [partial(shard_all, place)]
    works += [partial(_parse_all, place, loads) for loads in (json.loads, orjson.loads)]
    ours, *limits = (megabytes / seconds for seconds in least_cpu(works, tries))
    names = ("shard, against zstd + json", "shard, against zstd + orjson")
    reaches = (0.6, None)
    return [
        Row(name, "MB/CPU-s", ours, limit, ours / limit, reach)
        for name, limit, reach in zip(names, limits, reaches, strict=True)
    ]


def _parse_all(place: Place, loads: Callable[[bytes], object]) -> None:
    for source in place.sources:
        parse(source, loads)


def small(place: Place) -> Place:
    """The same sources in small shards."""
    return replace(place, settings=place.settings.model_copy(update={"shard_bytes": SHARD_BYTES}))


# ---- blocks ------------------------------------------------------------------------------------------------


def block_rows(place: Place, tries: int = TRIES) -> list[Row]:
    """MB of text a CPU second, over the first shard of the first source: ours beside the tokenizer alone."""
    place = small(place)
    store, shard = place.store(), shards_of(shard_all(place)[0])[0]
    texts = read_table(store.local(store.receipt(shard)) / FILE).column("text").to_pylist()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    plain = Tokenizer.from_file(str(Path(place.vocabulary.folder) / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    fast = load_tokenizer(place.vocabulary)
    works: list[Callable[[], object]] = [
        partial(make_blocks, store, shard, BlockSettings(), place.vocabulary, force=True)
    ]
    works += [partial(_encode, encode, texts) for encode in (plain.encode_batch, fast.encode_batch_fast)]
    ours, *limits = (megabytes / seconds for seconds in least_cpu(works, tries))
    return [
        Row("blocks, against encode_batch", "MB/CPU-s", ours, limits[0], ours / limits[0], 0.9),
        Row("blocks, against encode_batch_fast, larger cache", "MB/CPU-s", ours, limits[1], ours / limits[1]),
    ]


def _encode(encode: Callable[..., object], texts: Sequence[str]) -> None:
    for start in range(0, len(texts), BATCH):
        encode(texts[start : start + BATCH], add_special_tokens=False)


# ---- two processes -----------------------------------------------------------------------------------------


def chain(place: Place, number: int) -> float:
    """One source to its shards and the blocks of the first, in a store of its own; CPU seconds."""
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=place.folder) as home:
        store = Store(Path(home))
        receipt = shard_source(store, place.sources[number % len(place.sources)], place.settings)
        make_blocks(store, shards_of(receipt)[0], BlockSettings(), place.vocabulary)
    return time.process_time() - start


def scaling_row(place: Place, jobs: int = JOBS) -> Row:
    """What a source costs where two worker processes are busy at once, beside one that is alone."""
    place, speeds = small(place), []
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(chain, place), range(processes)))  # starts the processes, loads the tokenizer
            speeds.append(jobs / sum(pool.map(partial(chain, place), [0] * jobs)))
    one, two = speeds
    return Row("shard + blocks, each of two processes against one alone", "sources/CPU-s", two, one, two / one)


def measure(place: Place) -> list[Row]:
    """All lines."""
    return [*shard_rows(place), *block_rows(place), scaling_row(place)]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of .jsonl.zst sources")
    parser.add_argument("--tokenizer", type=Path, default=TEACHER, help="folder of the tokenizer")
    parser.add_argument("--sources", type=int, default=1, help="sources that are measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    settings = CorpusSettings(url=str(given.corpus), pattern="*.jsonl.zst")
    with tempfile.TemporaryDirectory() as folder:
        sources = take_snapshot(settings).sources[: given.sources]
        rows = measure(Place(sources, settings, load_vocabulary(str(given.tokenizer)), Path(folder)))
    facts = facts_of(
        corpus=f"{shown(given.corpus)}, {len(sources)} sources, {sum(one.size for one in sources) / 1e6:.1f} MB packed",
        tokenizer=shown(given.tokenizer),
    )
    publish(Report("corpus", "Shards and blocks", facts, rows, notes_of(__doc__)), given.results)


if __name__ == "__main__":
    main()
