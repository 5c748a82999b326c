"""Counts the lines and documents of a source, and writes its bad lines to quarantine.jsonl.

    counts = DocumentCounts(source.name, recipe.corpus, folder / "quarantine.jsonl")
    counts.quarantine(line, "not JSON", data)
    counts.finish()

tasks/corpus/filters.py defines the limit for bad lines.
"""

import json
from pathlib import Path

from storage.errors import FatalError
from tasks.corpus.document import unknown_schema_error
from tasks.corpus.filters import EARLY_STOP_MARGIN, bad_line_limit
from tasks.recipe.config import CorpusSettings

EXCERPT_CHARS = 200
"""Characters of each bad line that are stored."""

MIN_LINES_TO_REJECT_SCHEMA = 10
"""Bad lines allowed at the start of a source before its schema counts as unknown (or max_bad_lines, if more)."""


class DocumentCounts:
    """Counts lines, documents and bad lines of one source, and appends each bad line to a JSON-lines file."""

    def __init__(self, name: str, corpus: CorpusSettings, quarantine_file: Path) -> None:
        self.name = name
        self.schema = ""  # set by the reader once it is known
        self.lines = 0  # rows, in parquet
        self.documents = 0
        self.bad_lines = 0
        self._corpus = corpus
        self._first: tuple[int, str, str] | None = None
        self._path = quarantine_file
        quarantine_file.write_bytes(b"")

    def quarantine(self, line: int, reason: str, data: bytes) -> None:
        """Records one bad line. Raises FatalError if far too many lines are bad, or all lines at the start."""
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

        Raises FatalError if the source contains no documents, its schema is unknown, or too many lines are bad.
        """
        if self.bad_lines and not self.schema:
            raise self._unknown_schema()
        if self.bad_lines > self._limit:
            raise self._too_many_bad_lines()
        if not self.documents:
            raise FatalError(
                f"{self.name} contains no documents; download it again or remove it from the corpus folder", self.name
            )

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
