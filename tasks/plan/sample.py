"""A measured sample: a few MB of the real sources through the project's own readers, shards and blocks, in a scratch
store. What `distil plan` and the check for room multiply up.

    with TemporaryDirectory() as folder:
        sample = take_sample(Store(folder), recipe.corpus, recipe.blocks, recipe.mask, vocabulary, sources, 4_000_000)

Of each sampled source the beginning is unpacked into a file of its own, cut at the end of a line: to the reader that is
a whole small source, so where we stop reading is no damage of the real one. A corpus below the budget is read whole.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifact import Receipt, Ref
from storage.errors import FatalError
from storage.filesystem import open_url
from storage.store import Store
from tasks.corpus.fetch import read_head
from tasks.corpus.lines import CHUNK, UnpackedSizeLimit, packing_of, reading_error
from tasks.corpus.parquet import record_batches
from tasks.corpus.shard import heldout_of, shard_source, shards_of
from tasks.corpus.snapshot import Source
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings
from tasks.tokens.blocks import make_blocks, open_blocks
from tasks.tokens.mask import masked_count
from tasks.tokens.vocabulary import Vocabulary, load_tokenizer

SOURCES = 8
"""Most sampled sources, spread over the snapshot; more only where these are too small for the budget."""

LEAST = 1 << 20
"""Bytes of a packed source that are read at least: less says too little of how well it packs."""

UNSEEN = 4 * CHUNK
"""Bytes before the cut that a packed stream is not fed with: two of its blocks, so that it never meets the cut."""

PIECE = 1 << 12
"""Unpacked bytes read at once: so exactly is it known which packed bytes they come from."""


@dataclass(frozen=True)
class Sample:
    """What was counted and timed; bytes, counts and seconds of one process. Sums, so that two samples add up.

    `source_bytes` of the source files stand behind `text_bytes` of UTF-8 text (held out or not) in `shard_bytes` of
    shards, and `tokens` (special ones too) in `rows` blocks of `block_bytes`, `positions` of them masked under one
    mask. `documents` were read, of which `dropped` by filters, as duplicates or as bad lines, and `heldout`.
    """

    sources: int = 0
    source_bytes: float = 0.0
    documents: int = 0
    dropped: int = 0
    heldout: int = 0
    text_bytes: int = 0
    shard_bytes: int = 0
    tokens: int = 0
    rows: int = 0
    positions: int = 0
    block_bytes: int = 0
    read_seconds: float = 0.0
    block_seconds: float = 0.0
    blocks: tuple[Ref, ...] = ()

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def take_sample(
    store: Store,
    corpus: CorpusSettings,
    blocks: BlockSettings,
    mask: MaskSettings,
    vocabulary: Vocabulary,
    sources: Sequence[Source],
    budget: int,
    *,
    skip_bad: bool = False,
) -> Sample:
    """Reads about `budget` bytes of the source files into the scratch store `store`.

    FatalError for a source that cannot be read, unless `skip_bad`; then for all of them an empty sample.
    """
    load_tokenizer(vocabulary)  # once a process in the real run too, so not in the time of the first shard
    sample = Sample()
    for source, limit in _chosen(sources, budget):
        try:
            sample += _sample_source(store, source, limit, corpus, blocks, mask, vocabulary)
        except FatalError:
            if not skip_bad:
                raise
    return sample


def _chosen(sources: Sequence[Source], budget: int) -> Iterable[tuple[Source, int]]:
    """Which sources, evenly spread, and how many bytes of each."""
    total = sum(source.size for source in sources)
    if total <= budget:
        return [(source, source.size) for source in sources]
    count = min(len(sources), max(min(SOURCES, budget // LEAST), budget * len(sources) // total, 1))
    chosen = [sources[number * len(sources) // count] for number in range(count)]
    return [(source, max(LEAST, budget // count) + UNSEEN) for source in chosen]


def _sample_source(
    store: Store,
    source: Source,
    limit: int,
    corpus: CorpusSettings,
    blocks: BlockSettings,
    mask: MaskSettings,
    vocabulary: Vocabulary,
) -> Sample:
    with store.scratch() as folder:
        started = time.perf_counter()
        path = folder / Path(source.name).name
        taken = _cut(source, limit, path, corpus.max_unpacked_ratio)
        unpacked = time.perf_counter() - started
        # The label of the real one, so that errors name it; the bytes of the cut are its identity.
        copy = replace(source, url=str(path), size=path.stat().st_size, stamp="", sha256=None, companion=None)
        if source.companion:  # the cut has none, but is parted as the whole will be
            corpus = corpus.model_copy(update={"text": "paragraphs"})
        receipt = shard_source(store, copy, corpus)
    shards = [store.receipt(ref) for ref in (*shards_of(receipt), *heldout_of(receipt))]
    made = [make_blocks(store, shard.ref, blocks, vocabulary) for shard in shards]
    counts = receipt.info["counts"]
    # The real source is hashed packed, the cut was hashed unpacked.
    hashed = receipt.timings["hash"] * taken / max(1, copy.size)
    return Sample(
        sources=1,
        source_bytes=taken,
        documents=counts["documents"] + counts["bad"],
        dropped=counts["documents"] + counts["bad"] - counts["kept"] - counts["heldout"],
        heldout=counts["heldout"],
        text_bytes=counts["bytes"],
        shard_bytes=sum(shard.size for shard in shards),
        tokens=sum(one.tokens for one in made),
        rows=sum(one.rows for one in made),
        positions=sum(_positions(store, one, mask) for one in made),
        block_bytes=sum(one.size for one in made),
        read_seconds=unpacked + hashed + receipt.timings["parse"],
        block_seconds=sum(one.timings["seconds"] for one in made),
        blocks=tuple(one.ref for one in made),
    )


def _positions(store: Store, blocks: Receipt, mask: MaskSettings) -> int:
    """Positions that tasks.mask chooses in these blocks."""
    return int(masked_count(mask.rate, open_blocks(store, blocks.ref).lengths).sum())


# ---- the beginning of a source -----------------------------------------------------------------------------


def _cut(source: Source, limit: int, path: Path, ratio: int) -> float:
    """Writes the unpacked beginning of a source to `path`; returns how many bytes of the source it stands for.

    `limit` are the bytes of the source to read. FatalError: gone, or damaged or grown beyond `ratio` before that.
    """
    head = read_head(source, limit)
    whole = len(head) == source.size
    if whole:
        path.write_bytes(head)
        return len(head)
    if head.startswith(b"PAR1"):
        return _cut_parquet(source, limit, path, ratio)
    text, used = _unpacked(head, source, ratio)
    if text.startswith(b"PAR1"):  # packed parquet has its footer where only the whole file shows it
        return _cut(source, source.size, path, ratio)
    last = text.rfind(b"\n") + 1 or len(text)
    path.write_bytes(text[:last])
    return used * last / max(1, len(text))


def _unpacked(head: bytes, source: Source, ratio: int) -> tuple[bytes, float]:
    """The text that a cut-off beginning surely holds, and how many bytes of the source it stands for.

    A stream packs its beginning worse than the rest, since it has nothing yet to refer back to: the rest of the source
    is taken to be packed like the second half of what is seen.
    """
    packing = packing_of(head)
    if not packing:
        return head, len(head)
    parts: list[bytes] = []
    seen = [(0, 0)]  # packed bytes taken and text given so far
    growth = UnpackedSizeLimit(source.name, len(head), ratio)
    try:
        with pa.BufferReader(head) as file, pa.CompressedInputStream(file, packing) as stream:
            # The stream takes new bytes, many at once, when it has given all of the old.
            while (chunk := stream.read(PIECE)) and file.tell() < len(head) - UNSEEN:
                growth.add(len(chunk))
                parts.append(chunk)
                seen.append((file.tell(), seen[-1][1] + len(chunk)))
    except OSError as error:
        raise reading_error(error, source.name) from error
    used, given = seen[-1]
    used_half, given_half = max(pair for pair in seen if 2 * pair[0] <= used)
    whole = given + (source.size - used) * (given - given_half) / max(1, used - used_half)
    return b"".join(parts), source.size * given / max(1.0, whole)


def _cut_parquet(source: Source, limit: int, path: Path, ratio: int) -> float:
    """The first rows of a parquet file, as many as `limit` bytes of it hold on average."""
    fs, remote = open_url(source.url)
    try:
        with fs.open(remote, "rb") as file, fs.open(remote, "rb") as again, pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            wanted, taken = ceil(rows * limit / source.size), 0
            growth = UnpackedSizeLimit(source.name, source.size, ratio)
            with pq.ParquetWriter(path, parquet.schema_arrow) as writer:
                for batch in record_batches(parquet, again, source.name):
                    if taken >= wanted:
                        break
                    growth.add(batch.nbytes)
                    writer.write_batch(batch)
                    taken += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise reading_error(error, source.name) from error
    return float(source.size * taken / max(1, rows))
