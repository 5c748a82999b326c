"""What parts the documents of a plain text: the end of a line (OSCAR 2019) or a blank line (21.09).

    parted, chunks = seen(chunks)                      # "lines" or "paragraphs", by the beginning
    for line in without_paragraphs(lines, name): ...   # FatalError where the rest contradicts "lines"

Nothing in such a file says which it is, and a few blank lines occur in files of lines too. So what counts is how often
they stand there. Called by tasks/corpus/reader.py where the recipe leaves it open (corpus.text).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Literal

from storage.errors import FatalError
from tasks.corpus.lines import LongLine

SEEN = 4 << 20
"""Bytes of the beginning that decide: some 20,000 lines, so that one long document at the start does not."""

OFTEN = 100
"""Blank lines part documents if there is one to at most so many lines; fewer are accidents in a file of lines."""

GAPS = 100
"""After the beginning, so many of them in OFTEN times as many lines contradict it."""

Parted = Literal["lines", "paragraphs"]


def seen(chunks: Iterator[bytes]) -> tuple[Parted, Iterator[bytes]]:
    """What parts a text by its first SEEN bytes, and the chunks of the whole."""
    head: list[bytes] = []
    size = 0
    for chunk in chunks:
        head.append(chunk)
        size += len(chunk)
        if size >= SEEN:
            break
    return "paragraphs" if _has_paragraphs(b"".join(head)) else "lines", chain(head, chunks)


def without_paragraphs(lines: Iterable[bytes | LongLine], name: str) -> Iterator[bytes | LongLine]:
    """The lines of a text of one document a line. FatalError where blank lines part them, GAPS of them that OFTEN."""
    gaps: deque[int] = deque(maxlen=GAPS)
    before = False
    for number, line in enumerate(lines, 1):
        blank = isinstance(line, bytes) and not line.strip()
        if before and not blank:
            gaps.append(number)
            if len(gaps) == GAPS and number - gaps[0] <= OFTEN * GAPS:
                raise FatalError(
                    f"{name} begins like one document a line, but from line {gaps[0]:,} on blank lines part its texts; "
                    'set corpus.text to "lines" or "paragraphs", whichever it is',
                    name,
                    gaps[0],
                )
        before = blank
        yield line


def _has_paragraphs(sample: bytes) -> bool:
    """True if blank lines stand between texts, and often enough to be more than an accident in a file of lines."""
    lines = [bool(line.strip()) for line in sample.split(b"\n")]
    gaps = sum(not before and after for before, after in pairwise(lines))
    return gaps > 0 and sum(lines) <= OFTEN * gaps
