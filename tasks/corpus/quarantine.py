"""Counts of one pass over a source, and the file of its bad lines, quarantine.jsonl.

    counts = DocumentCounts(source.name, recipe.corpus, folder / "quarantine.jsonl")
    counts.quarantine(line, "not JSON", data)
    counts.finish()

tasks/corpus/filters.py holds the limit for bad lines.
"""

import json
from pathlib import Path

from storage.errors import FatalError
from tasks.corpus.document import unknown_schema_error
from tasks.corpus.filters import EARLY_STOP_MARGIN, bad_line_limit
from tasks.recipe.config import CorpusSettings

EXCERPT_CHARS = 200
"""Characters of a bad line that are kept."""

MIN_LINES_TO_REJECT_SCHEMA = 10
"""Bad lines at the start of a source, with no good one among them, that leave its schema open."""


class DocumentCounts:
    """Counts lines, documents and bad lines of one source, and appends each bad line to a JSON-lines file."""

    def __init__(self, name: str, corpus: CorpusSettings, quarantine_file: Path) -> None:
        self.name = name
        self.schema = ""  # set by the reader as soon as it is known
        self.lines = 0  # rows, in parquet
        self.documents = 0
        self.bad_lines = 0
        self._corpus = corpus
        self._first: tuple[int, str, str] | None = None
        self._path = quarantine_file
        quarantine_file.write_bytes(b"")

    def quarantine(self, line: int, reason: str, data: bytes) -> None:
        """Records one bad line. FatalError: far more bad lines than allowed, or no good one at the start."""
        excerpt = data[: EXCERPT_CHARS * 4].decode("utf-8", "replace")[:EXCERPT_CHARS]
        entry = {"line": line, "reason": reason, "excerpt": excerpt}
        with self._path.open("ab") as file:  # bad lines are rare
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._first = self._first or (line, reason, excerpt)
        self.bad_lines += 1
        if not self.schema and self.bad_lines > max(self._corpus.max_bad_lines, MIN_LINES_TO_REJECT_SCHEMA):
            raise self._unknown_schema()
        if self.bad_lines > self._limit + EARLY_STOP_MARGIN:
            raise self._too_many_bad_lines()

    def finish(self) -> None:
        """Checks the counts at the end of the source.

        FatalError: no document, no known schema, or more bad lines than allowed.
        """
        if self.bad_lines and not self.schema:
            raise self._unknown_schema()
        if self.bad_lines > self._limit:
            raise self._too_many_bad_lines()
        if not self.documents:
            raise FatalError(f"{self.name} holds no document; fetch it again or leave it out", self.name)

    @property
    def _limit(self) -> int:
        return bad_line_limit(self.lines, self._corpus)

    def _too_many_bad_lines(self) -> FatalError:
        line, reason, excerpt = self._first or (0, "", "")
        return FatalError(
            f"{self.name}: {self.bad_lines} of {self.lines} lines are bad, more than the {self._limit} allowed; "
            f"the first is line {line} ({reason}): {excerpt[:60]!r}; fix the file or raise corpus.max_bad_lines",
            self.name,
            line,
        )

    def _unknown_schema(self) -> FatalError:
        line, reason, excerpt = self._first or (0, "", "")
        return unknown_schema_error(self.name, f"in line {line} {reason}: {excerpt[:60]!r}", line)
