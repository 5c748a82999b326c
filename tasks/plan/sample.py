"""Measures a sample of a corpus: reads a few MB of the sources and makes shards and blocks in a scratch store.

    with TemporaryDirectory() as folder:
        sample = take_sample(Store(folder), recipe.corpus, recipe.blocks, recipe.mask, vocabulary, sources, 4_000_000)

`distil plan` and the check of free space extrapolate from the sample. The beginning of each sampled source is
decompressed into a file that ends at the end of a line, so the reader gets a complete small source, not a truncated
one. A corpus smaller than the budget is read completely.
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
from storage.files.filesystem import open_url
from storage.store import Store
from tasks.corpus.fetch import read_head
from tasks.corpus.formats.lines import CHUNK, UnpackedSizeLimit, packing_of, reading_error
from tasks.corpus.formats.parquet import record_batches
from tasks.corpus.shard import heldout_of, shard_source, shards_of
from tasks.corpus.snapshot import Source
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings
from tasks.tokens.blocks import make_blocks, open_blocks
from tasks.tokens.mask import masked_count
from tasks.tokens.vocabulary import Vocabulary, load_tokenizer

SOURCES = 8
"""Maximum number of sources to sample, evenly spaced in the snapshot; exceeded if they are smaller than the budget."""

MIN_BYTES = 1 << 20
"""Minimum bytes to read from a compressed source; with fewer, its compression ratio cannot be estimated."""

UNSEEN = 4 * CHUNK
"""Bytes before the cut that are not decompressed: the stream reads ahead by blocks and must never reach the cut."""

PIECE = 1 << 12
"""Decompressed bytes per read, which is the accuracy of their attribution to compressed bytes."""


@dataclass(frozen=True)
class Sample:
    """Counts, bytes and seconds (of one process). All fields are sums, so samples can be added.

    source_bytes               bytes read from the source files (compressed bytes for compressed files)
    documents                  number of documents read
    dropped, heldout           numbers of documents dropped (by filters, as duplicates or bad lines), and held out
    text_bytes, shard_bytes    bytes of UTF-8 text of the documents that were not dropped, and of their shards
    rows, tokens, block_bytes  numbers of blocks and tokens (with special tokens), and bytes of the blocks
    positions                  number of masked positions under one mask
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

    FatalError if a source cannot be read; with `skip_bad`, such sources are skipped instead.
    """
    load_tokenizer(vocabulary)  # before timing: a run also loads the tokenizer only once per process
    sample = Sample()
    for source, limit in _chosen(sources, budget):
        try:
            sample += _sample_source(store, source, limit, corpus, blocks, mask, vocabulary)
        except FatalError:
            if not skip_bad:
                raise
    return sample


def _chosen(sources: Sequence[Source], budget: int) -> Iterable[tuple[Source, int]]:
    """Returns the sources to sample, evenly spaced, and the bytes to read from each."""
    total = sum(source.size for source in sources)
    if total <= budget:
        return [(source, source.size) for source in sources]
    count = min(len(sources), max(min(SOURCES, budget // MIN_BYTES), budget * len(sources) // total, 1))
    chosen = [sources[number * len(sources) // count] for number in range(count)]
    return [(source, max(MIN_BYTES, budget // count) + UNSEEN) for source in chosen]


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
        # The copy keeps the label of the real source, which error messages contain, but is identified by its own bytes.
        copy = replace(source, url=str(path), size=path.stat().st_size, stamp="", sha256=None, companion=None)
        if source.companion:  # the copy has no companion, but is split into documents like the real source
            corpus = corpus.model_copy(update={"text": "paragraphs"})
        receipt = shard_source(store, copy, corpus)
    shards = [store.receipt(ref) for ref in (*shards_of(receipt), *heldout_of(receipt))]
    made = [make_blocks(store, shard.ref, blocks, vocabulary) for shard in shards]
    counts = receipt.info["counts"]
    # A run hashes the compressed source; here, the decompressed copy was hashed.
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
    """Counts the masked positions of these blocks under one mask."""
    return int(masked_count(mask.rate, open_blocks(store, blocks.ref).lengths).sum())


# ---- the beginning of a source -----------------------------------------------------------------------------


def _cut(source: Source, limit: int, path: Path, ratio: int) -> float:
    """Writes the decompressed beginning of a source to `path`; returns the number of source bytes that it represents.

    `limit` is the number of bytes to read from the source. FatalError if the source does not exist, is damaged, or
    decompresses to more than `ratio` times its size.
    """
    head = read_head(source, limit)
    if len(head) == source.size:
        path.write_bytes(head)
        return len(head)
    if head.startswith(b"PAR1"):
        return _cut_parquet(source, limit, path, ratio)
    text, used = _unpacked(head, source, ratio)
    if text.startswith(b"PAR1"):  # compressed parquet: its footer needs the complete file
        return _cut(source, source.size, path, ratio)
    last = text.rfind(b"\n") + 1 or len(text)
    path.write_bytes(text[:last])
    return used * last / max(1, len(text))


def _unpacked(head: bytes, source: Source, ratio: int) -> tuple[bytes, float]:
    """Returns the decompressed text of a truncated source, and the number of source bytes that it represents.

    The beginning of a stream is compressed less than the rest, since it has no earlier data to refer to. The rest of
    the source is therefore assumed to have the compression ratio of the second half of the beginning.
    """
    packing = packing_of(head)
    if not packing:
        return head, len(head)
    parts: list[bytes] = []
    seen = [(0, 0)]  # compressed bytes read and text bytes returned so far
    growth = UnpackedSizeLimit(source.name, len(head), ratio)
    try:
        with pa.BufferReader(head) as file, pa.CompressedInputStream(file, packing) as stream:
            # The stream returns all text of the bytes that it has read before it reads the next large chunk.
            while (chunk := stream.read(PIECE)) and file.tell() < len(head) - UNSEEN:
                growth.add(len(chunk))
                parts.append(chunk)
                seen.append((file.tell(), seen[-1][1] + len(chunk)))
    except OSError as error:
        raise reading_error(error, source.name) from error
    used, given = seen[-1]
    used_half, given_half = max(pair for pair in seen if 2 * pair[0] <= used)
    all_text = given + (source.size - used) * (given - given_half) / max(1, used - used_half)
    return b"".join(parts), source.size * given / max(1.0, all_text)


def _cut_parquet(source: Source, limit: int, path: Path, ratio: int) -> float:
    """Copies the first rows of a parquet file, on average `limit` bytes of it; returns the source bytes of the rows."""
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
