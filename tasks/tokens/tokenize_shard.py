"""Token ids of a text shard, piece by piece, so that memory is bounded however large the shard or a document is.

    counts = Counts()
    for piece in tokenised(path, vocabulary, counts):      # path of a text.arrow
        ...piece.ids, piece.sizes

Called by tasks.block.
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
"""UTF-8 bytes of text that are tokenised at once: hundreds of documents, about 50 MB of encodings."""

_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")

Ids = npt.NDArray[np.uint32]

Int64s = npt.NDArray[np.int64]


@dataclass
class PieceCounts:
    """What was seen on the way; `literal_specials` are explained at `_clean_table`."""

    with_tokens: int = 0
    text_tokens: int = 0
    unknown: int = 0
    literal_specials: int = 0


class TextPiece(NamedTuple):
    """The ids of some documents end to end, how many belong to each (never 0), and whether the first one goes on
    from the piece before."""

    ids: Ids
    sizes: Int64s
    continued: bool


def tokenize(path: Path, vocabulary: Vocabulary, counts: PieceCounts) -> Iterator[TextPiece]:
    """Tokenises without special tokens, in order; `counts` grows on the way."""
    tokenizer = load_tokenizer(vocabulary)
    clean, unknown = _clean_table(tokenizer, vocabulary)
    last = -1
    for texts, number in _pieces(path):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        sizes = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        total = int(sizes.sum())
        raw = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.uint32, count=total)
        ids = clean[raw]
        with_tokens = number + np.flatnonzero(sizes)
        continued = total > 0 and int(with_tokens[0]) == last
        last = int(with_tokens[-1]) if total else last
        counts.with_tokens += len(with_tokens) - continued
        counts.text_tokens += total
        counts.literal_specials += int((ids != raw).sum())
        counts.unknown += int(unknown[raw].sum())
        if total:
            yield TextPiece(ids, sizes[sizes > 0], continued)


def _clean_table(tokenizer: Tokenizer, vocabulary: Vocabulary) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Raw id -> id for the model, and whether the raw id means unknown.

    Text that spells a special token (`<s>` is strike-through in HTML) would get its id, and an added token above the
    model's rows would crash it. Inside a text both become unknown; the count of tokens stays what it was.
    """
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    table = np.arange(max(highest + 1, vocabulary.size), dtype=np.uint32)
    table[vocabulary.size :] = vocabulary.unk
    table[[token for token in vocabulary.specials if token not in vocabulary.unknowns]] = vocabulary.unk
    unknown = np.zeros(len(table), dtype=np.bool_)
    unknown[list(vocabulary.unknowns)] = True
    return table, unknown


def _pieces(path: Path) -> Iterator[tuple[list[str], int]]:
    """Documents in order, at most PIECE_BYTES at once, with the number of the first; a longer one comes in parts."""
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
    """Cuts a text every PIECE_BYTES characters or later, before a single space between two words.

    There the tokenizers of all families begin a new word anyway, so the tokens of the parts are those of the whole.
    A text without such a space stays whole: Unigram, BPE and WordPiece take time in proportion to its length.
    """
    start = 0
    while cut := _BETWEEN_WORDS.search(text, start + PIECE_BYTES):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
