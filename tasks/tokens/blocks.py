"""Blocks of token ids, made from a text shard: what teacher and student read.

    receipt = make_blocks(store, shard, recipe.blocks, vocabulary)
    blocks = open_blocks(store, receipt.ref)       # blocks.input_ids [rows, length], memory-mapped

Called by the flows, one call a shard, in worker processes. The bytes depend on the key alone, not on workers, threads
or batch sizes. Text is read, tokenised and written piece by piece, so memory is bounded by a piece of a few MB.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.arrow import ArrowWriter, blocks_schema, open_arrow
from storage.artifact import Receipt, Ref
from storage.cache import PinnedFolder
from storage.fingerprint import key_of
from storage.store import Store
from tasks.recipe.config import BlockSettings as BlockSettings
from tasks.tokens.tokenize_shard import Ids, Int64s, PieceCounts, TextPiece, tokenize
from tasks.tokens.vocabulary import Vocabulary

SCHEMA = 1


@dataclass(frozen=True)
class Blocks:
    """Token ids of one shard: `input_ids` [rows, length] uint16 or uint32, memory-mapped; `lengths` [rows] int32."""

    input_ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    key: str
    label: str
    held: PinnedFolder | None = field(default=None, repr=False)
    """Keeps a copy in the cache while these are in use."""

    def __len__(self) -> int:
        return len(self.lengths)


def blocks_ref(shard: Ref, blocks: BlockSettings, vocabulary: Vocabulary) -> Ref:
    """Names the blocks of a text shard."""
    return Ref("blocks", key_of("blocks", SCHEMA, _settings(blocks, vocabulary), [shard.key]), shard.label)


def make_blocks(
    store: Store, shard: Ref, blocks: BlockSettings, vocabulary: Vocabulary, *, force: bool = False
) -> Receipt:
    """Tokenises one text shard, hashed first, and packs it. Does nothing where the blocks are there, unless `force`.

    FatalError that names the shard if its text is not there or damaged.
    Receipt: rows = blocks, tokens = all that are not padding; info: documents, empty (documents without a token),
    text_tokens (special tokens left out), unknown, literal_specials (see tasks.tokens).
    """
    ref = blocks_ref(shard, blocks, vocabulary)
    if not force and store.has(ref):
        return store.receipt(ref)
    # One process works on one shard on one core; who wants threads inside it says so by this variable.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    source = store.receipt(shard)
    counts = PieceCounts()
    with store.pin(source, check=True) as text, store.scratch() as folder, store.scratch() as spool:
        pack = _packed if blocks.packing == "packed" else _one_a_document
        pieces = tokenize(text / "text.arrow", vocabulary, counts)
        lengths = _spool(pack(pieces, blocks.length, vocabulary), spool / "ids")
        _write(folder / "blocks.arrow", spool / "ids", lengths, blocks.length, vocabulary)
        return store.commit(
            ref,
            folder,
            schema=SCHEMA,
            rows=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            settings=_settings(blocks, vocabulary),
            parents=[shard.key],
            info=_info(source.rows, counts),
            timings={"seconds": time.perf_counter() - started},
        )


def _info(documents: int, counts: PieceCounts) -> dict[str, int]:
    return {
        "documents": documents,
        "empty": documents - counts.with_tokens,
        "text_tokens": counts.text_tokens,
        "unknown": counts.unknown,
        "literal_specials": counts.literal_specials,
    }


def open_blocks(store: Store, ref: Ref) -> Blocks:
    """Hashes the blocks of a shard and maps them into memory. FatalError if they are not there or damaged."""
    held = store.pin(store.receipt(ref), check=True)
    reader = open_arrow(held.folder / "blocks.arrow")
    length = reader.schema.field("input_ids").type.list_size
    batch = reader.get_batch(0)
    ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True).reshape(-1, length)
    return Blocks(ids, batch.column("length").to_numpy(zero_copy_only=True), ref.key, ref.label, held)


def counts_ref(sample: Sequence[Ref]) -> Ref:
    """Names the token counts of a sample of blocks (those of the first shards, chosen by the caller)."""
    return Ref("counts", key_of("counts", SCHEMA, {}, [ref.key for ref in sample]), f"{sample[0].label}x{len(sample)}")


def count_tokens(store: Store, sample: Sequence[Ref], vocabulary: Vocabulary, *, force: bool = False) -> Receipt:
    """Counts how often each piece occurs in the sample, padding left out; smoothed masks are drawn by it."""
    ref = counts_ref(sample)
    if not force and store.has(ref):
        return store.receipt(ref)
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for blocks in (open_blocks(store, blocks_ref) for blocks_ref in sample):
        for start in range(0, len(blocks), 4096):
            rows = blocks.input_ids[start : start + 4096]
            attended = np.arange(rows.shape[1]) < blocks.lengths[start : start + 4096, None]
            counts += np.bincount(rows[attended], minlength=vocabulary.size)
    with store.scratch() as folder:
        with ArrowWriter(folder / "counts.arrow", pa.schema([("count", pa.int64())])) as writer:
            writer.write({"count": pa.array(counts)})
        return store.commit(
            ref,
            folder,
            schema=SCHEMA,
            rows=vocabulary.size,
            tokens=int(counts.sum()),
            settings={},
            parents=[blocks_ref.key for blocks_ref in sample],
        )


def read_counts(store: Store, ref: Ref) -> npt.NDArray[np.int64]:
    """The counts [vocabulary size] that `count_tokens` wrote, hashed. FatalError: none there, or damaged."""
    table = open_arrow(store.check(store.receipt(ref)) / "counts.arrow").read_all()
    counts: npt.NDArray[np.int64] = table.column("count").to_numpy()
    return counts


def _settings(blocks: BlockSettings, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"length": blocks.length, "packing": blocks.packing, "tokenizer": vocabulary.fingerprint}


# ---- ids -> blocks -----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Finished blocks: ids [n, length] and lengths [n]."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]


def _packed(pieces: Iterator[TextPiece], length: int, vocabulary: Vocabulary) -> Iterator[_Rows]:
    """Documents joined by eos and cut every length - 2 tokens; the last block is padded."""
    body = length - 2
    rest: Ids = np.empty(0, dtype=np.uint32)
    is_first = True
    for ids, sizes, continued in pieces:
        starts = np.cumsum(sizes) - sizes
        joined = np.insert(ids, starts[1:] if is_first or continued else starts, vocabulary.eos)
        is_first = False
        flow = np.concatenate([rest, joined])
        full = len(flow) // body
        yield _full_rows(flow[: full * body].reshape(full, body), vocabulary)
        rest = flow[full * body :]
    if len(rest):
        yield _padded_rows(rest, np.array([len(rest)]), length, vocabulary)


def _one_a_document(pieces: Iterator[TextPiece], length: int, vocabulary: Vocabulary) -> Iterator[_Rows]:
    """Every document begins a block; a longer one is cut every length - 2 tokens."""
    rest: Ids = np.empty(0, dtype=np.uint32)  # of the last document, which the next piece may continue
    for ids, sizes, continued in pieces:
        flow = np.concatenate([rest, ids])
        sizes = np.concatenate([[len(rest) + sizes[0]], sizes[1:]] if continued else [[len(rest)], sizes])
        done = len(flow) - sizes[-1]
        yield _padded_rows(flow[:done], _cut_sizes(sizes[:-1], length - 2), length, vocabulary)
        rest = flow[done:]
    yield _padded_rows(rest, _cut_sizes(np.array([len(rest)]), length - 2), length, vocabulary)


def _cut_sizes(sizes: Int64s, body: int) -> Int64s:
    """Tokens in each block when documents of these sizes are cut every `body` tokens."""
    sizes = sizes[sizes > 0]
    blocks = -(-sizes // body)
    taken = np.full(int(blocks.sum()), body, dtype=np.int64)
    taken[np.cumsum(blocks) - 1] = sizes - (blocks - 1) * body
    return taken


def _full_rows(bodies: Ids, vocabulary: Vocabulary) -> _Rows:
    rows, body = bodies.shape
    out = np.empty((rows, body + 2), dtype=_dtype(vocabulary))
    out[:, 0] = vocabulary.bos
    out[:, 1:-1] = bodies
    out[:, -1] = vocabulary.eos
    return _Rows(out, np.full(rows, body + 2, dtype=np.int32))


def _padded_rows(ids: Ids, taken: Int64s, length: int, vocabulary: Vocabulary) -> _Rows:
    """Row i holds the next `taken[i]` of the ids."""
    rows = np.arange(len(taken))
    out = np.full((len(taken), length), vocabulary.pad, dtype=_dtype(vocabulary))
    out[:, 0] = vocabulary.bos
    column = np.arange(len(ids)) - np.repeat(np.cumsum(taken) - taken, taken)
    out[np.repeat(rows, taken), column + 1] = ids
    out[rows, taken + 1] = vocabulary.eos
    return _Rows(out, (taken + 2).astype(np.int32))


def _dtype(vocabulary: Vocabulary) -> npt.DTypeLike:
    dtype: npt.DTypeLike = blocks_schema(1, vocabulary.size).field("input_ids").type.value_type.to_pandas_dtype()
    return dtype


# ---- blocks -> file ----------------------------------------------------------------------------------------


def _spool(rows: Iterator[_Rows], path: Path) -> npt.NDArray[np.int32]:
    """Writes bare ids as they come and returns the lengths: the final file needs to know how many rows there are."""
    lengths = [np.empty(0, dtype=np.int32)]
    with open(path, "wb") as file:
        for ids, row_lengths in rows:
            file.write(ids.data)
            lengths.append(row_lengths)
    return np.concatenate(lengths)


def _write(path: Path, spool: Path, lengths: npt.NDArray[np.int32], length: int, vocabulary: Vocabulary) -> None:
    """One record batch for the whole file, so that a reader maps it as one array [rows, length]."""
    schema = blocks_schema(length, vocabulary.size)
    kind = schema.field("input_ids").type
    buffer = pa.memory_map(str(spool)).read_buffer() if len(lengths) else pa.py_buffer(b"")
    values = pa.Array.from_buffers(kind.value_type, len(lengths) * length, [None, buffer])
    with ArrowWriter(path, schema, {"pad": str(vocabulary.pad), "vocabulary": str(vocabulary.size)}) as writer:
        writer.write({"input_ids": pa.FixedSizeListArray.from_arrays(values, type=kind), "length": pa.array(lengths)})
