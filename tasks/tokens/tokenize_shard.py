"""Tokenizes a text shard in pieces, so that memory use is bounded for shards and documents of any size.

    counts = PieceCounts()
    for piece in tokenize(path, vocabulary, counts):      # path of a text.arrow
        ...                                               # piece.ids, piece.sizes

tasks.tokens.blocks packs the pieces into blocks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tokenizers import Tokenizer

from storage.arrow import open_arrow
from tasks.tokens.vocabulary import Vocabulary, load_tokenizer

PIECE_BYTES = 1_000_000
"""UTF-8 bytes of text per piece: hundreds of documents, about 50 MB of encodings."""

_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")

Ids = npt.NDArray[np.uint32]

Int64s = npt.NDArray[np.int64]


@dataclass
class PieceCounts:
    """Running counts of `tokenize`.

    `with_tokens`: documents with at least one token. `text_tokens`: tokens. `unknown`: tokens of text that is not in
    the vocabulary. `literal_specials`: special tokens spelled out in the text and replaced by the unknown token (see
    `_clean_table`).
    """

    with_tokens: int = 0
    text_tokens: int = 0
    unknown: int = 0
    literal_specials: int = 0


class TextPiece(NamedTuple):
    """Concatenated token ids of consecutive documents.

    `sizes`: tokens per document, never 0. `continued`: whether the first document continues the last document of the
    previous piece.
    """

    ids: Ids
    sizes: Int64s
    continued: bool


def tokenize(path: Path, vocabulary: Vocabulary, counts: PieceCounts) -> Iterator[TextPiece]:
    """Tokenizes the documents of a text.arrow file in order, without adding special tokens; updates `counts`."""
    tokenizer = load_tokenizer(vocabulary)
    clean, unknown = _clean_table(tokenizer, vocabulary)
    last = -1
    for texts, first in _pieces(path):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        sizes = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        total = int(sizes.sum())
        raw = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.uint32, count=total)
        ids = clean[raw]
        with_tokens = first + np.flatnonzero(sizes)
        continued = total > 0 and int(with_tokens[0]) == last
        last = int(with_tokens[-1]) if total else last
        counts.with_tokens += len(with_tokens) - continued
        counts.text_tokens += total
        counts.literal_specials += int((ids != raw).sum())
        counts.unknown += int(unknown[raw].sum())
        if total:
            yield TextPiece(ids, sizes[sizes > 0], continued)


def _clean_table(tokenizer: Tokenizer, vocabulary: Vocabulary) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Returns a table from each raw id to the id for the model, and whether each raw id means unknown.

    Without the table, text that spells a special token (`<s>` is strike-through in HTML) would get the id of that
    token, and an added token whose id exceeds the model's embedding rows would crash the model. The table maps both to
    the unknown token; the number of tokens does not change.
    """
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    table = np.arange(max(highest + 1, vocabulary.size), dtype=np.uint32)
    table[vocabulary.size :] = vocabulary.unk
    table[[token for token in vocabulary.specials if token not in vocabulary.unknowns]] = vocabulary.unk
    unknown = np.zeros(len(table), dtype=np.bool_)
    unknown[list(vocabulary.unknowns)] = True
    return table, unknown


def _pieces(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yields consecutive documents of up to PIECE_BYTES with the number of the first one; splits longer documents."""
    reader = open_arrow(path)
    first = 0
    for index in range(reader.num_record_batches):
        column = reader.get_batch(index).column("text")
        ends = np.cumsum(pc.binary_length(column).to_numpy(zero_copy_only=False))
        start = 0
        while start < len(column):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + PIECE_BYTES, side="right")))
            texts = column.slice(start, stop - start).to_pylist()
            if stop > start + 1:
                yield texts, first + start
            else:
                yield from (([part], first + start) for part in _parts(texts[0]))
            start = stop
        first += len(column)


def _parts(text: str) -> Iterator[str]:
    """Splits a text at the first single space between two words after every PIECE_BYTES characters.

    The tokenizers of all families start a new token there, so the parts have the same tokens as the complete text. A
    text without such a space is not split; Unigram, BPE and WordPiece tokenize it in linear time.
    """
    start = 0
    while cut := _BETWEEN_WORDS.search(text, start + PIECE_BYTES):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
