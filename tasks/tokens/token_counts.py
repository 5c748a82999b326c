"""Counts how often each token occurs in a sample of blocks; smoothed masks use the counts as token weights.

    receipt = count_tokens(store, sample, vocabulary)         # once per recipe; stored as an artifact
    counts = read_counts(store, receipt.ref)                  # int64 [vocabulary size]

The caller fixes the sample, so the counts do not change when the corpus grows.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.arrow import ArrowWriter, open_arrow
from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store
from tasks.tokens.blocks import open_blocks
from tasks.tokens.vocabulary import Vocabulary

SCHEMA = 1

COUNTS_FILE = "counts.arrow"

CHUNK_ROWS = 4096
"""Blocks counted at once."""


def counts_ref(sample: Sequence[Ref]) -> Ref:
    """Returns the reference of the token counts of a sample of blocks, usually those of the first shards."""
    return Ref("counts", key_of("counts", SCHEMA, {}, [ref.key for ref in sample]), f"{sample[0].label}x{len(sample)}")


def count_tokens(store: Store, sample: Sequence[Ref], vocabulary: Vocabulary, *, force: bool = False) -> Receipt:
    """Counts each token in the sample, padding excluded. Existing counts are kept unless `force` is True.

    Receipt: rows = vocabulary size, tokens = sum of the counts. FatalError: blocks are missing or damaged.
    """
    ref = counts_ref(sample)
    if not force and store.has(ref):
        return store.receipt(ref)
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for blocks in (open_blocks(store, blocks_ref) for blocks_ref in sample):
        for start in range(0, len(blocks), CHUNK_ROWS):
            rows = blocks.input_ids[start : start + CHUNK_ROWS]
            attended = np.arange(rows.shape[1]) < blocks.lengths[start : start + CHUNK_ROWS, None]
            counts += np.bincount(rows[attended], minlength=vocabulary.size)
    with store.scratch() as folder:
        with ArrowWriter(folder / COUNTS_FILE, pa.schema([("count", pa.int64())])) as writer:
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
    """Reads the token counts [vocabulary size]. FatalError: they are missing or damaged."""
    table = open_arrow(store.verified_folder(store.receipt(ref)) / COUNTS_FILE).read_all()
    counts: npt.NDArray[np.int64] = table.column("count").to_numpy()
    return counts
