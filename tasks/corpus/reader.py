"""Reads the documents of one source file for shard.py: OSCAR of any year, or plain jsonl, txt or parquet.

    counts = DocumentCounts(name, corpus, folder / "quarantine.jsonl")
    for document in read_documents(path, name, corpus, counts, folder): ...
    counts.finish()

The schema is detected from the data:

    oscar-2019      text, one document per line                     oscar-22.01  {content, metadata{annotation, ...}}
    oscar-21.09     text, a blank line between documents            oscar-23.01  {content, metadata{harmful_pp, ...}}
    jsonl           {text} or {content}                             parquet      the same fields as columns

Plain text has no magic bytes, so a file is treated as text if its name contains `.txt`; text_layout.py detects how its
documents are separated. Each unreadable line is counted and quarantined, up to the limit in filters.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from storage.errors import FatalError
from tasks.corpus.document import FIELDS, Document, labels_of, unknown_schema_error
from tasks.corpus.filters import long_document_reason, long_line_reason, utf8_reason
from tasks.corpus.formats.lines import LongLine, chunks_of, split_lines
from tasks.corpus.formats.parquet import read_parquet
from tasks.corpus.formats.text_layout import detect_layout, reject_paragraphs
from tasks.corpus.quarantine import EXCERPT_CHARS, DocumentCounts
from tasks.recipe.config import CorpusSettings

_UNSUPPORTED_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\xfd7zXZ\x00": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
}

_FIELDS_OF_23_01 = {"quality_warnings", "harmful_pp", "tlsh", "categories"}


def read_documents(
    path: Path, name: str, corpus: CorpusSettings, counts: DocumentCounts, folder: Path, companion: Path | None = None
) -> Iterator[Document]:
    """Yields the documents of a local file in order, and records bad lines in `counts`; then call `counts.finish()`.

    `name` is the name of the source: errors cite it, and `.txt` in it identifies text. `companion` is the metadata file
    of an OSCAR 21.09 pair. `folder` is for temporary files.

    Raises FatalError if the schema is unknown, if the file is damaged or truncated or unpacks to far more bytes than
    text does, if the files of a pair do not match, or if a text separates its documents in two ways.
    """
    chunks = chunks_of(path, name, corpus.max_unpacked_ratio)
    sample = next(chunks, b"")
    if not sample:
        raise FatalError(f"{name} is empty; download it again or remove it from the corpus folder", name)
    if sample.startswith(b"PAR1"):
        yield from read_parquet(path, chain([sample], chunks), name, counts, folder, corpus)
        return
    sample = sample.removeprefix(b"\xef\xbb\xbf")
    lines = split_lines(chain([sample], chunks), corpus.max_line_bytes, name)
    if companion is not None:
        counts.schema = "oscar-21.09"
        yield from _paragraphs(lines, corpus.max_line_bytes, counts)
        _check_pair(companion, name, counts, corpus.max_unpacked_ratio)
    elif _looks_like_json(sample, name):
        yield from _records(lines, counts)
    elif not _looks_like_text(sample, name):
        raise unknown_schema_error(name, _describe(sample))
    else:
        yield from _texts(chain([sample], chunks), name, corpus, counts)


# ---- JSON lines --------------------------------------------------------------------------------------------


def _records(lines: Iterable[bytes | LongLine], counts: DocumentCounts) -> Iterator[Document]:
    field = ""
    for counts.lines, line in enumerate(lines, 1):
        record, fault = _record(line)
        if record is not None:
            if not field:
                field, counts.schema = _schema_of(record)
            text = record.get(field)
            if isinstance(text, str):
                counts.documents += 1
                yield Document(text.encode(), len(text), counts.lines, labels_of(record.get("metadata")))
                continue
            fault = _fault_of(record, field)
        if fault:
            counts.quarantine(counts.lines, fault, _head(line))


def _record(line: bytes | LongLine) -> tuple[dict[str, Any] | None, str]:
    """Returns the JSON object of a line, or None and the fault; a blank line has no object and no fault."""
    if isinstance(line, LongLine):
        return None, long_line_reason(line.size)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None, ""
        return None, utf8_reason(line) or f"not JSON ({error})"
    return (record, "") if isinstance(record, dict) else (None, f"not a JSON object but {_kind(record)}")


def _schema_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the field that contains the text and the name of the schema; both are "" if the record has no text."""
    field = next((field for field in FIELDS if isinstance(record.get(field), str)), "")
    metadata = record.get("metadata")
    if not field or not isinstance(metadata, dict):
        return field, "jsonl" if field else ""
    if _FIELDS_OF_23_01 & metadata.keys():
        return field, "oscar-23.01"
    return field, "oscar-22.01" if "annotation" in metadata else "jsonl"


def _fault_of(record: Mapping[str, Any], field: str) -> str:
    if "nb_sentences" in record:
        return "OSCAR 21.09 metadata without its text file (fr_meta_part_1.jsonl.gz goes with fr_part_1.txt.gz)"
    if field in record:
        return f"the field {field} is {_kind(record[field])}"
    fields = _fields(record) or "none"
    return f"a JSON object without the field {field or ' or '.join(FIELDS)} (its fields: {fields})"


def _fields(record: Mapping[str, Any]) -> str:
    """Returns the first field names of a record, truncated and without newlines, since the file is untrusted."""
    return ", ".join(" ".join(field[:40].split()) for field in sorted(record)[:8])


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# ---- text --------------------------------------------------------------------------------------------------


def _texts(chunks: Iterator[bytes], name: str, corpus: CorpusSettings, counts: DocumentCounts) -> Iterator[Document]:
    """Yields the documents of a text without metadata, in the layout `corpus.text`, which "auto" detects."""
    layout = corpus.text
    if auto := layout == "auto":
        layout, chunks = detect_layout(chunks)
    lines = split_lines(chunks, corpus.max_line_bytes, name)
    if layout == "paragraphs":
        counts.schema = "oscar-21.09"
        yield from _paragraphs(lines, corpus.max_line_bytes, counts)
    else:
        counts.schema = "oscar-2019"
        yield from _text_lines(reject_paragraphs(lines, name) if auto else lines, counts)


def _text_lines(lines: Iterable[bytes | LongLine], counts: DocumentCounts) -> Iterator[Document]:
    """Yields one document per line (OSCAR 2019)."""
    for counts.lines, line in enumerate(lines, 1):
        text = _text(line, counts)
        if text:
            counts.documents += 1
            yield Document(text[0], text[1], counts.lines, None)


def _paragraphs(lines: Iterable[bytes | LongLine], limit: int, counts: DocumentCounts) -> Iterator[Document]:
    """Yields the documents of a text with one sentence per line and blank lines between documents (OSCAR 21.09)."""
    sentences: list[bytes] = []
    chars = size = first = 0
    for counts.lines, line in enumerate(chain(lines, [b""]), 1):
        if isinstance(line, bytes) and not line.strip():
            if first:
                counts.documents += 1  # even if all its lines are bad, because the metadata file counts it too
            if sentences and size <= limit:
                yield Document(b"\n".join(sentences), chars + len(sentences) - 1, first, None)
            sentences, chars, size, first = [], 0, 0, 0
            continue
        first = first or counts.lines
        text = _text(line, counts)
        if not text or size > limit:
            continue
        sentences.append(text[0])
        chars += text[1]
        size += len(text[0]) + 1
        if size > limit:
            counts.quarantine(first, long_document_reason(limit), sentences[0])
            sentences = sentences[:1]
    counts.lines -= 1  # the blank line that this function appended


def _text(line: bytes | LongLine, counts: DocumentCounts) -> tuple[bytes, int] | None:
    """Returns the UTF-8 text of a line and its number of characters, or None if it is blank or quarantined."""
    if isinstance(line, LongLine):
        counts.quarantine(counts.lines, long_line_reason(line.size), line.head)
        return None
    line = line.rstrip(b"\r")
    try:
        chars = len(line.decode())
    except UnicodeDecodeError:
        counts.quarantine(counts.lines, utf8_reason(line), line)
        return None
    return (line, chars) if line.strip() else None


def _check_pair(companion: Path, name: str, counts: DocumentCounts, ratio: int) -> None:
    """Raises FatalError unless the metadata file of an OSCAR 21.09 pair has one record per document of the text."""
    records = 0
    for line in split_lines(chunks_of(companion, companion.name, ratio), 1 << 26, companion.name):
        record, fault = _record(line)
        if record is not None and "nb_sentences" not in record:
            fields = _fields(record)
            raise unknown_schema_error(
                companion.name,
                f"fields {fields} in the metadata file of {name}, where OSCAR 21.09 has headers, nb_sentences",
            )
        records += record is not None or fault != ""
    if records != counts.documents:
        raise FatalError(
            f"{name} contains {counts.documents} documents, but its metadata file {companion.name} has {records} "
            "records; download both again, or remove the metadata file to read only the text",
            name,
        )


# ---- detection of the format --------------------------------------------------------------------------------


def _looks_like_json(sample: bytes, name: str) -> bool:
    """Returns True if the name contains .json, one of ten lines is a JSON object, or a JSON line exceeds the sample."""
    if ".json" in name.lower():
        return True
    head = sample.split(b"\n", 10)
    if any(_record(line)[0] is not None for line in head[:10]):
        return True
    return len(head) == 1 and head[0].lstrip().startswith(b'{"')


def _looks_like_text(sample: bytes, name: str) -> bool:
    """Returns True if the name contains .txt and the bytes may be text; web text may contain single zero bytes."""
    return (
        ".txt" in name.lower()
        and 10 * sample.count(0) < len(sample)
        and not sample.startswith(tuple(_UNSUPPORTED_MAGIC))
    )


def _describe(sample: bytes) -> str:
    """Describes the first bytes of a file of unknown schema."""
    for magic, kind in _UNSUPPORTED_MAGIC.items():
        if sample.startswith(magic):
            return kind
    if b"\0" in sample[:4096]:
        return f"binary data that begins with {sample[:8]!r}"
    first = sample[: EXCERPT_CHARS * 4].decode("utf-8", "replace").split("\n", 1)[0][:60]
    return f"text that begins with {first!r} (plain text needs .txt in its name)"


def _head(line: bytes | LongLine) -> bytes:
    return line.head if isinstance(line, LongLine) else line
