"""Packs the token ids of a text shard into blocks of equal length, the input of teacher and student.

    receipt = make_blocks(store, shard, recipe.blocks, vocabulary)
    blocks = open_blocks(store, receipt.ref)       # blocks.input_ids [R, L], memory-mapped

`make_blocks` is called once per shard, in a worker process. The bytes of the blocks depend on their key alone, not on
the number of workers, threads or batch sizes. Text is read, tokenized and written in pieces of about 1 MB, so memory
use is bounded.

Shapes: R rows (blocks), L tokens per block, special tokens included.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.arrow import BLOCKS_FILE, TEXT_FILE, ArrowWriter, blocks_schema, open_arrow
from storage.artifact import Receipt, Ref
from storage.cache import PinnedFolder
from storage.fingerprint import key_of
from storage.store import Store
from tasks.recipe.config import BlockSettings
from tasks.tokens.tokenize_shard import Ids, Int64s, PieceCounts, TextPiece, tokenize
from tasks.tokens.vocabulary import Vocabulary

SCHEMA = 1


@dataclass(frozen=True)
class Blocks:
    """The token ids of one shard, memory-mapped.

    `input_ids` [R, L]: uint16 or uint32. `lengths` [R]: int32, tokens per block without padding.
    """

    input_ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    key: str
    label: str
    pinned: PinnedFolder | None = field(default=None, repr=False)
    """Keeps the local copy of a remote file in the cache while this object is alive."""

    def __len__(self) -> int:
        return len(self.lengths)


def blocks_ref(shard: Ref, blocks: BlockSettings, vocabulary: Vocabulary) -> Ref:
    """Returns the reference of the blocks of a text shard, without computing them."""
    return Ref("blocks", key_of("blocks", SCHEMA, _settings(blocks, vocabulary), [shard.key]), shard.label)


def make_blocks(
    store: Store, shard: Ref, blocks: BlockSettings, vocabulary: Vocabulary, *, force: bool = False
) -> Receipt:
    """Verifies, tokenizes and packs one text shard. Existing blocks are kept unless `force` is True.

    Receipt: rows = blocks, tokens = all tokens except padding; info: documents, empty (documents without a token),
    text_tokens (tokens without special tokens), unknown, literal_specials (see `PieceCounts`).

    FatalError: the text is missing or damaged; the message contains the label of the shard.
    """
    ref = blocks_ref(shard, blocks, vocabulary)
    if not force and store.has(ref):
        return store.receipt(ref)
    # Each worker process uses one core; set the variable to "true" to let the tokenizer use several threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    source = store.receipt(shard)
    counts = PieceCounts()
    with store.pin(source, check=True) as text, store.scratch() as folder, store.scratch() as spool:
        pack = _packed if blocks.packing == "packed" else _one_per_document
        pieces = tokenize(text / TEXT_FILE, vocabulary, counts)
        lengths = _spool(pack(pieces, blocks.length, vocabulary), spool / "ids")
        _write(folder / BLOCKS_FILE, spool / "ids", lengths, blocks.length, vocabulary)
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
    """Verifies the hash of a shard's blocks and maps them into memory. FatalError: they are missing or damaged."""
    pinned = store.pin(store.receipt(ref), check=True)
    reader = open_arrow(pinned.folder / BLOCKS_FILE)
    length = reader.schema.field("input_ids").type.list_size
    batch = reader.get_batch(0)
    ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True).reshape(-1, length)
    return Blocks(ids, batch.column("length").to_numpy(zero_copy_only=True), ref.key, ref.label, pinned)


def _settings(blocks: BlockSettings, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"length": blocks.length, "packing": blocks.packing, "tokenizer": vocabulary.fingerprint}


# ---- ids -> blocks -----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Finished blocks: ids [n, L] and lengths [n]."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]


def _packed(pieces: Iterator[TextPiece], length: int, vocabulary: Vocabulary) -> Iterator[_Rows]:
    """Joins documents with eos and cuts the stream after every length - 2 tokens; only the last block is padded."""
    body = length - 2
    rest: Ids = np.empty(0, dtype=np.uint32)
    is_first = True
    for ids, sizes, continued in pieces:
        starts = np.cumsum(sizes) - sizes
        joined = np.insert(ids, starts[1:] if is_first or continued else starts, vocabulary.eos)
        is_first = False
        stream = np.concatenate([rest, joined])
        full = len(stream) // body
        yield _full_rows(stream[: full * body].reshape(full, body), vocabulary)
        rest = stream[full * body :]
    if len(rest):
        yield _padded_rows(rest, np.array([len(rest)]), length, vocabulary)


def _one_per_document(pieces: Iterator[TextPiece], length: int, vocabulary: Vocabulary) -> Iterator[_Rows]:
    """Starts a new block at every document; longer documents are cut after every length - 2 tokens."""
    rest: Ids = np.empty(0, dtype=np.uint32)  # the last document so far, which the next piece may continue
    for ids, sizes, continued in pieces:
        stream = np.concatenate([rest, ids])
        sizes = np.concatenate([[len(rest) + sizes[0]], sizes[1:]] if continued else [[len(rest)], sizes])
        done = len(stream) - sizes[-1]
        yield _padded_rows(stream[:done], _cut_sizes(sizes[:-1], length - 2), length, vocabulary)
        rest = stream[done:]
    yield _padded_rows(rest, _cut_sizes(np.array([len(rest)]), length - 2), length, vocabulary)


def _cut_sizes(sizes: Int64s, body: int) -> Int64s:
    """Returns the tokens per block after documents of these sizes are cut every `body` tokens."""
    sizes = sizes[sizes > 0]
    blocks = -(-sizes // body)
    block_sizes = np.full(int(blocks.sum()), body, dtype=np.int64)
    block_sizes[np.cumsum(blocks) - 1] = sizes - (blocks - 1) * body
    return block_sizes


def _full_rows(bodies: Ids, vocabulary: Vocabulary) -> _Rows:
    rows, body = bodies.shape
    out = np.empty((rows, body + 2), dtype=_dtype(vocabulary))
    out[:, 0] = vocabulary.bos
    out[:, 1:-1] = bodies
    out[:, -1] = vocabulary.eos
    return _Rows(out, np.full(rows, body + 2, dtype=np.int32))


def _padded_rows(ids: Ids, sizes: Int64s, length: int, vocabulary: Vocabulary) -> _Rows:
    """Builds padded blocks: row i contains bos, the next `sizes[i]` ids, eos and padding."""
    rows = np.arange(len(sizes))
    out = np.full((len(sizes), length), vocabulary.pad, dtype=_dtype(vocabulary))
    out[:, 0] = vocabulary.bos
    column = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    out[np.repeat(rows, sizes), column + 1] = ids
    out[rows, sizes + 1] = vocabulary.eos
    return _Rows(out, (sizes + 2).astype(np.int32))


def _dtype(vocabulary: Vocabulary) -> npt.DTypeLike:
    return np.dtype(str(blocks_schema(1, vocabulary.size).field("input_ids").type.value_type))  # "uint16" or "uint32"


# ---- blocks -> file ----------------------------------------------------------------------------------------


def _spool(rows: Iterator[_Rows], path: Path) -> npt.NDArray[np.int32]:
    """Writes raw ids to a temporary file, since a record batch needs its number of rows first. Returns the lengths
    [R]."""
    lengths = [np.empty(0, dtype=np.int32)]
    with open(path, "wb") as file:
        for ids, row_lengths in rows:
            file.write(ids.data)
            lengths.append(row_lengths)
    return np.concatenate(lengths)


def _write(path: Path, spool: Path, lengths: npt.NDArray[np.int32], length: int, vocabulary: Vocabulary) -> None:
    """Writes all rows as one record batch, so that a reader maps them as one array [R, L]."""
    schema = blocks_schema(length, vocabulary.size)
    kind = schema.field("input_ids").type
    buffer = pa.memory_map(str(spool)).read_buffer() if len(lengths) else pa.py_buffer(b"")
    values = pa.Array.from_buffers(kind.value_type, len(lengths) * length, [None, buffer])
    with ArrowWriter(path, schema, {"pad": str(vocabulary.pad), "vocabulary": str(vocabulary.size)}) as writer:
        writer.write({"input_ids": pa.FixedSizeListArray.from_arrays(values, type=kind), "length": pa.array(lengths)})
