"""Documents out of one source file of any OSCAR generation, or plain jsonl, txt or parquet. Called by shard.py.

    tally = Tally(name, corpus, folder / "quarantine.jsonl")
    for document in read_documents(path, name, corpus, tally, folder): ...
    tally.finish()

The schema is recognised from the data (FACTS.md lists them):

    oscar-2019      text, one document a line                       oscar-22.01  {content, metadata{annotation, ...}}
    oscar-21.09     text, a blank line between documents            oscar-23.01  {content, metadata{harmful_pp, ...}}
    jsonl           {text} or {content}                             parquet      the same fields as columns

Only text has no mark of its own, so it is taken as text where the name says `.txt`, and paragraphs.py finds what
parts its documents. What cannot be read is counted and quarantined line by line, up to the limit of the recipe.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from storage.errors import FatalError
from tasks.corpus.document import EXCERPT, FIELDS, Document, Tally, labels_of, unknown_schema_error
from tasks.corpus.lines import LongLine, chunks_of, split_lines
from tasks.corpus.paragraphs import seen, without_paragraphs
from tasks.corpus.parquet import rows_of_parquet
from tasks.recipe.config import CorpusSettings

_FOREIGN = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\xfd7zXZ\x00": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
}

_23_01 = {"quality_warnings", "harmful_pp", "tlsh", "categories"}


def read_documents(
    path: Path, name: str, corpus: CorpusSettings, tally: Tally, folder: Path, companion: Path | None = None
) -> Iterator[Document]:
    """Every document of a local file, in order; bad lines go to `tally`. Call `tally.finish()` after the last one.

    `name` is what errors call the file and may say `.txt`; `companion` is the metadata file of a 21.09 pair; `folder`
    takes temporary files. FatalError: unknown schema, damaged or cut short archive, one that unpacks to far more than
    text does, a pair that does not fit together, text that is parted in two ways.
    """
    chunks = chunks_of(path, name, corpus.max_unpacked_ratio)
    sample = next(chunks, b"")
    if not sample:
        raise FatalError(f"{name} is empty; fetch it again or leave it out", name)
    if sample.startswith(b"PAR1"):
        yield from rows_of_parquet(path, chain([sample], chunks), name, tally, folder, corpus)
        return
    sample = sample.removeprefix(b"\xef\xbb\xbf")
    lines = split_lines(chain([sample], chunks), corpus.max_line_bytes, name)
    if companion is not None:
        tally.schema = "oscar-21.09"
        yield from _paragraphs(lines, corpus.max_line_bytes, tally)
        _check_pair(companion, name, tally, corpus.max_unpacked_ratio)
    elif _looks_like_json(sample, name):
        yield from _records(lines, tally)
    elif not _looks_like_text(sample, name):
        raise unknown_schema_error(name, _found(sample))
    else:
        yield from _texts(chain([sample], chunks), name, corpus, tally)


# ---- JSON lines --------------------------------------------------------------------------------------------


def _records(lines: Iterable[bytes | LongLine], tally: Tally) -> Iterator[Document]:
    field = ""
    for tally.lines, line in enumerate(lines, 1):
        record, fault = _record(line)
        if record is not None:
            if not field:
                field, tally.schema = _schema_of(record)
            text = record.get(field)
            if isinstance(text, str):
                tally.documents += 1
                yield Document(text.encode(), len(text), tally.lines, labels_of(record.get("metadata")))
                continue
            fault = _fault_of(record, field)
        if fault:
            tally.quarantine(tally.lines, fault, _head(line))


def _record(line: bytes | LongLine) -> tuple[dict[str, Any] | None, str]:
    """(the JSON object in a line, what is wrong with the line): one of the two, or neither for a blank line."""
    if isinstance(line, LongLine):
        return None, f"a line of {line.size:,} bytes"
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None, ""
        return None, _wrong_utf8(line) or f"not JSON ({error})"
    return (record, "") if isinstance(record, dict) else (None, f"not a JSON object but {_kind(record)}")


def _schema_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """(field that has the text, name of the schema), both empty if the record has no text."""
    field = next((field for field in FIELDS if isinstance(record.get(field), str)), "")
    metadata = record.get("metadata")
    if not field or not isinstance(metadata, dict):
        return field, "jsonl" if field else ""
    if _23_01 & metadata.keys():
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
    """The first names of a record, each in one line and cut: they are the file's, not ours."""
    return ", ".join(" ".join(field[:40].split()) for field in sorted(record)[:8])


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# ---- text --------------------------------------------------------------------------------------------------


def _texts(chunks: Iterator[bytes], name: str, corpus: CorpusSettings, tally: Tally) -> Iterator[Document]:
    """Documents of a text without metadata, parted as `corpus.text` says or as the text shows."""
    parted = corpus.text
    if auto := parted == "auto":
        parted, chunks = seen(chunks)
    lines = split_lines(chunks, corpus.max_line_bytes, name)
    if parted == "paragraphs":
        tally.schema = "oscar-21.09"
        yield from _paragraphs(lines, corpus.max_line_bytes, tally)
    else:
        tally.schema = "oscar-2019"
        yield from _text_lines(without_paragraphs(lines, name) if auto else lines, tally)


def _text_lines(lines: Iterable[bytes | LongLine], tally: Tally) -> Iterator[Document]:
    """One document a line (2019)."""
    for tally.lines, line in enumerate(lines, 1):
        text = _text(line, tally)
        if text:
            tally.documents += 1
            yield Document(text[0], text[1], tally.lines, None)


def _paragraphs(lines: Iterable[bytes | LongLine], limit: int, tally: Tally) -> Iterator[Document]:
    """One sentence a line, a blank line between documents (21.09)."""
    held: list[bytes] = []
    chars = size = first = 0
    for tally.lines, line in enumerate(chain(lines, [b""]), 1):
        if isinstance(line, bytes) and not line.strip():
            if first:
                tally.documents += 1  # also if none of its lines could be read: the metadata file counts it too
            if held and size <= limit:
                yield Document(b"\n".join(held), chars + len(held) - 1, first, None)
            held, chars, size, first = [], 0, 0, 0
            continue
        first = first or tally.lines
        text = _text(line, tally)
        if not text or size > limit:
            continue
        held.append(text[0])
        chars += text[1]
        size += len(text[0]) + 1
        if size > limit:
            tally.quarantine(first, f"a document of more than {limit:,} bytes", held[0])
            held = held[:1]
    tally.lines -= 1  # the blank line that was put at the end


def _text(line: bytes | LongLine, tally: Tally) -> tuple[bytes, int] | None:
    """(UTF-8, number of characters) of a line; None if it is blank or was quarantined."""
    if isinstance(line, LongLine):
        tally.quarantine(tally.lines, f"a line of {line.size:,} bytes", line.head)
        return None
    line = line.rstrip(b"\r")
    try:
        chars = len(line.decode())
    except UnicodeDecodeError:
        tally.quarantine(tally.lines, _wrong_utf8(line), line)
        return None
    return (line, chars) if line.strip() else None


def _check_pair(companion: Path, name: str, tally: Tally, ratio: int) -> None:
    """FatalError unless the metadata file of a 21.09 pair has one record for each document of the text."""
    records = 0
    for line in split_lines(chunks_of(companion, companion.name, ratio), 1 << 26, companion.name):
        record, fault = _record(line)
        if record is not None and "nb_sentences" not in record:
            fields = _fields(record)
            raise unknown_schema_error(
                companion.name, f"fields {fields} beside {name}, where 21.09 has headers, nb_sentences"
            )
        records += record is not None or fault != ""
    if records != tally.documents:
        raise FatalError(
            f"{name} holds {tally.documents} documents, but its metadata file {companion.name} {records}; fetch both "
            "again, or remove the metadata file to read the text alone",
            name,
        )


# ---- what a file is ----------------------------------------------------------------------------------------


def _looks_like_json(sample: bytes, name: str) -> bool:
    """True if the name says so, if one of the first ten lines is a JSON object, or if the first has no end yet."""
    if ".json" in name.lower():
        return True
    head = sample.split(b"\n", 10)
    if any(_record(line)[0] is not None for line in head[:10]):
        return True
    return len(head) == 1 and head[0].lstrip().startswith(b'{"')


def _looks_like_text(sample: bytes, name: str) -> bool:
    """True if the name says so and nothing speaks against it; single zero bytes do occur in text from the web."""
    return ".txt" in name.lower() and 10 * sample.count(0) < len(sample) and not sample.startswith(tuple(_FOREIGN))


def _found(sample: bytes) -> str:
    """What a file of no known schema looks like."""
    for magic, kind in _FOREIGN.items():
        if sample.startswith(magic):
            return kind
    if b"\0" in sample[:4096]:
        return f"binary data that begins with {sample[:8]!r}"
    first = sample[: EXCERPT * 4].decode("utf-8", "replace").split("\n", 1)[0][:60]
    return f"text that begins with {first!r} (plain text needs .txt in its name)"


def _wrong_utf8(line: bytes) -> str:
    """What is wrong with the encoding of a line, or empty."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start + 1})"
    return ""


def _head(line: bytes | LongLine) -> bytes:
    return line.head if isinstance(line, LongLine) else line
