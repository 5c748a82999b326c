"""Detects how plain text separates its documents: one per line (OSCAR 2019) or by blank lines (21.09).

    layout, chunks = detect_layout(chunks)            # "lines" or "paragraphs", from the first 4 MiB
    for line in reject_paragraphs(lines, name): ...   # raises FatalError if the rest contradicts "lines"

Plain text does not declare its layout. A few blank lines also occur in files with one document per line, so the
frequency of blank lines decides. tasks/corpus/reader.py calls this module if corpus.text is "auto".
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Literal

from storage.errors import FatalError
from tasks.corpus.formats.lines import LongLine

SAMPLE_BYTES = 4 << 20
"""Bytes that are examined: about 20,000 lines, so that one long first document does not decide the layout."""

MAX_LINES_PER_GAP = 100
"""Maximum lines per gap (a run of blank lines) of a text whose blank lines separate documents."""

CONTRADICTING_GAPS = 100
"""Number of consecutive gaps, at no less than that frequency, that contradict the layout "lines" after the sample."""

Layout = Literal["lines", "paragraphs"]


def detect_layout(chunks: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    """Detects the layout from the first SAMPLE_BYTES bytes. Returns it with an iterator over all chunks of the text."""
    head: list[bytes] = []
    size = 0
    for chunk in chunks:
        head.append(chunk)
        size += len(chunk)
        if size >= SAMPLE_BYTES:
            break
    return "paragraphs" if _has_paragraphs(b"".join(head)) else "lines", chain(head, chunks)


def reject_paragraphs(lines: Iterable[bytes | LongLine], name: str) -> Iterator[bytes | LongLine]:
    """Yields the lines of a text with one document per line.

    Raises FatalError if blank lines turn out to separate the documents.
    """
    gaps: deque[int] = deque(maxlen=CONTRADICTING_GAPS)
    previous_blank = False
    for number, line in enumerate(lines, 1):
        blank = isinstance(line, bytes) and not line.strip()
        if previous_blank and not blank:
            gaps.append(number)
            if len(gaps) == CONTRADICTING_GAPS and number - gaps[0] <= MAX_LINES_PER_GAP * CONTRADICTING_GAPS:
                raise FatalError(
                    f"{name} begins with one document per line, but from line {gaps[0]:,} blank lines separate its "
                    'documents; set corpus.text to "lines" or "paragraphs", whichever is correct',
                    name,
                    gaps[0],
                )
        previous_blank = blank
        yield line


def _has_paragraphs(sample: bytes) -> bool:
    """Returns True if blank lines are so frequent that they separate documents."""
    lines = [bool(line.strip()) for line in sample.split(b"\n")]
    gaps = sum(not previous and line for previous, line in pairwise(lines))
    return gaps > 0 and sum(lines) <= MAX_LINES_PER_GAP * gaps
