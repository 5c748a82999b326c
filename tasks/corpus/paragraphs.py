"""Detects how plain text separates its documents: one per line (OSCAR 2019) or by blank lines (21.09).

    layout, chunks = detect_layout(chunks)            # "lines" or "paragraphs", from the first 4 MiB
    for line in reject_paragraphs(lines, name): ...   # FatalError if the rest contradicts "lines"

Such a file does not declare its layout, and a few blank lines occur in files of lines too, so their frequency decides.
Called by tasks/corpus/reader.py if corpus.text is "auto".
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Literal

from storage.errors import FatalError
from tasks.corpus.lines import LongLine

SAMPLE_BYTES = 4 << 20
"""Bytes from which the layout is detected: about 20,000 lines, so that one long first document does not decide."""

MAX_LINES_PER_GAP = 100
"""Blank lines separate documents if at least one in this many lines is blank; fewer occur in files of lines too."""

CONTRADICTING_GAPS = 100
"""Gaps at that frequency, one after another, that contradict the layout "lines" after the sample."""

Layout = Literal["lines", "paragraphs"]


def detect_layout(chunks: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    """The layout of a text by its first SAMPLE_BYTES bytes, and all of its chunks, those of the sample included."""
    head: list[bytes] = []
    size = 0
    for chunk in chunks:
        head.append(chunk)
        size += len(chunk)
        if size >= SAMPLE_BYTES:
            break
    return "paragraphs" if _has_paragraphs(b"".join(head)) else "lines", chain(head, chunks)


def reject_paragraphs(lines: Iterable[bytes | LongLine], name: str) -> Iterator[bytes | LongLine]:
    """Yields the lines of a text of one document per line. FatalError: its blank lines separate documents after all."""
    gaps: deque[int] = deque(maxlen=CONTRADICTING_GAPS)
    previous_blank = False
    for number, line in enumerate(lines, 1):
        blank = isinstance(line, bytes) and not line.strip()
        if previous_blank and not blank:
            gaps.append(number)
            if len(gaps) == CONTRADICTING_GAPS and number - gaps[0] <= MAX_LINES_PER_GAP * CONTRADICTING_GAPS:
                raise FatalError(
                    f"{name} begins with one document per line, but blank lines separate its documents from line "
                    f'{gaps[0]:,} on; set corpus.text to "lines" or "paragraphs", whichever is right',
                    name,
                    gaps[0],
                )
        previous_blank = blank
        yield line


def _has_paragraphs(sample: bytes) -> bool:
    """True if blank lines separate texts more often than they occur in a file of lines."""
    lines = [bool(line.strip()) for line in sample.split(b"\n")]
    gaps = sum(not previous and line for previous, line in pairwise(lines))
    return gaps > 0 and sum(lines) <= MAX_LINES_PER_GAP * gaps
