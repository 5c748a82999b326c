"""Documents and their labels, as the readers yield them for every schema.

    labels = labels_of(record.get("metadata"))
    document = Document(text.encode(), len(text), line_number, labels)

Made by tasks/corpus/reader.py and tasks/corpus/parquet.py, filtered by tasks/corpus/filters.py.
"""

from typing import NamedTuple

from storage.errors import FatalError

FIELDS = ("content", "text")
"""Fields that may hold the text of a record: `content` in OSCAR since 22.01, `text` elsewhere."""

_NUMBER = (int, float)


class Labels(NamedTuple):
    """Labels of a document; None or empty where its schema has none. `harmful_pp` is a perplexity: low is harmful."""

    language: str | None
    language_prob: float | None
    harmful_pp: float | None
    warnings: tuple[str, ...]


class Document(NamedTuple):
    """One document: its text as UTF-8, its length in characters, its first line (or row) in the source, from 1."""

    text: bytes
    chars: int
    line: int
    labels: Labels | None


def labels_of(metadata: object) -> Labels | None:
    """Labels from the `metadata` of a record, or None if it has none; 22.01 names quality warnings `annotation`."""
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


def unknown_schema_error(name: str, found: str, line: int | None = None) -> FatalError:
    """The error for a file of no known schema; `found` describes its content."""
    return FatalError(
        f"{name}: unknown schema, found {found}; the README lists what can be read, corpus.pattern leaves files out",
        name,
        line,
    )
