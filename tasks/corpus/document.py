"""Defines documents and their labels, which the readers yield for every schema.

    labels = labels_of(record.get("metadata"))
    document = Document(text.encode(), len(text), line_number, labels)

tasks/corpus/reader.py and tasks/corpus/formats/parquet.py create documents; tasks/corpus/filters.py filters them.
"""

from typing import NamedTuple

from storage.errors import FatalError

FIELDS = ("content", "text")
"""Fields that may contain the text of a record: `content` in OSCAR since 22.01, `text` elsewhere."""

_NUMBER = (int, float)


class Labels(NamedTuple):
    """Labels of a document, None or empty if missing. `harmful_pp` is a perplexity: low values mean harmful text."""

    language: str | None
    language_prob: float | None
    harmful_pp: float | None
    warnings: tuple[str, ...]


class Document(NamedTuple):
    """One document: UTF-8 text, length in characters, and number of its first line (or row) in the source, from 1."""

    text: bytes
    chars: int
    line: int
    labels: Labels | None


def labels_of(metadata: object) -> Labels | None:
    """Returns the labels in the `metadata` of a record, or None. OSCAR 22.01 calls quality warnings `annotation`."""
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
    """Returns the error for a file of unknown schema. `found` describes the content of the file."""
    return FatalError(
        f"{name}: unknown schema, found {found}; convert it to OSCAR, jsonl, txt or parquet, or exclude it with "
        "corpus.pattern",
        name,
        line,
    )
