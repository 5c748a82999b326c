"""What the readers give: documents, and a tally of what could not be read.

Made by tasks/corpus/reader.py and tasks/corpus/parquet.py, used by tasks/corpus/shard.py.
"""

import json
from pathlib import Path
from typing import NamedTuple

from storage.errors import FatalError
from tasks.recipe.config import CorpusSettings

FIELDS = ("content", "text")
"""Where a record has its text: OSCAR since 22.01, and everybody else."""

EXCERPT = 200
"""Characters of a bad line that are kept."""

BAD_SHARE = 0.001
"""Share of the lines that may be bad, where that is more than `corpus.max_bad_lines`."""

EARLY = 1000
"""So many bad lines beyond the limit for the lines so far end a source before its end."""


_NUMBER = (int, float)


class Labels(NamedTuple):
    """What a schema says about a document; None and empty where it does not say."""

    language: str | None
    prob: float | None
    harmful_pp: float | None
    warnings: tuple[str, ...]


class Document(NamedTuple):
    """One document: its text as UTF-8, its length in characters, its first line (or row) in the source, from 1."""

    text: bytes
    chars: int
    line: int
    labels: Labels | None


def labels_of(metadata: object) -> Labels | None:
    """Labels out of the `metadata` of a record (22.01 says `annotation` for quality warnings), or None."""
    if not isinstance(metadata, dict):
        return None
    identification = metadata.get("identification")
    if not isinstance(identification, dict):
        identification = {}
    language, prob, harmful_pp = identification.get("label"), identification.get("prob"), metadata.get("harmful_pp")
    warnings = metadata.get("quality_warnings") or metadata.get("annotation") or metadata.get("annotations")
    return Labels(
        language if isinstance(language, str) else None,
        prob if isinstance(prob, _NUMBER) else None,
        harmful_pp if isinstance(harmful_pp, _NUMBER) else None,
        tuple(warnings) if isinstance(warnings, list) else (),
    )


class Tally:
    """Counts what one pass over a source sees, and writes its bad lines to a file as JSON lines."""

    def __init__(self, name: str, corpus: CorpusSettings, quarantine: Path) -> None:
        self.name = name
        self.schema = ""  # set by the reader as soon as it is known
        self.lines = 0  # rows, in parquet
        self.documents = 0
        self.bad = 0
        self._max_bad = corpus.max_bad_lines
        self._first: tuple[int, str, str] | None = None
        self._path = quarantine
        quarantine.write_bytes(b"")

    def quarantine(self, line: int, reason: str, data: bytes) -> None:
        """Notes one bad line. FatalError if there are already far too many."""
        excerpt = data[: EXCERPT * 4].decode("utf-8", "replace")[:EXCERPT]
        entry = {"line": line, "reason": reason, "excerpt": excerpt}
        with self._path.open("ab") as file:  # bad lines are rare
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._first = self._first or (line, reason, excerpt)
        self.bad += 1
        if not self.schema and self.bad > max(self._max_bad, 10):
            raise self._unknown()
        if self.bad > self._limit + EARLY:
            raise self._too_many()

    def finish(self) -> None:
        """At the end of the source. FatalError if it was empty, of no known schema, or has too many bad lines."""
        if self.bad and not self.schema:
            raise self._unknown()
        if self.bad > self._limit:
            raise self._too_many()
        if not self.documents:
            raise FatalError(f"{self.name} holds no document; fetch it again or leave it out", self.name)

    @property
    def _limit(self) -> int:
        return max(self._max_bad, int(BAD_SHARE * self.lines))

    def _too_many(self) -> FatalError:
        line, reason, excerpt = self._first or (0, "", "")
        return FatalError(
            f"{self.name}: {self.bad} of {self.lines} lines are bad, more than the {self._limit} allowed; the first is "
            f"line {line} ({reason}): {excerpt[:60]!r}; mend the file or raise corpus.max_bad_lines",
            self.name,
            line,
        )

    def _unknown(self) -> FatalError:
        line, reason, excerpt = self._first or (0, "", "")
        return unknown_schema_error(self.name, f"in line {line} {reason}: {excerpt[:60]!r}", line)


def unknown_schema_error(name: str, found: str, line: int | None = None) -> FatalError:
    """The refusal of a file that is none of the schemas; `found` says what it looks like."""
    return FatalError(
        f"{name}: unknown schema, found {found}; the README lists what can be read, corpus.pattern leaves files out",
        name,
        line,
    )
