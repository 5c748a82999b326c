"""Loads a named-entity set in the schema of Jean-Baptiste/wikiner_fr: columns tokens, ner_tags (and id), tags 0 to 4.

    ner = load_ner("/data/wikineural/fr")     # or any fsspec URL, or a hub id such as Jean-Baptiste/wikiner_fr

A folder holds parquet files named by split: train-00000-of-00001.parquet, test.parquet, train/0000.parquet. Sentences
that occur twice, inside a split or across splits, are taken out and counted, so that no test sentence is ever trained
on. Called by tasks.ner.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from storage.error import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.entities import LABELS

SPLITS = ("test", "validation", "train")
"""In the order in which they may keep a sentence that is in several: the test split stays as it is."""
_SPLIT_FILE = re.compile(r"(?:^|/)(train|validation|test)(?:[-.][^/]*)?(?:/[^/]*)?\.parquet$")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Sentence:
    """Words and their tags (numbers in LABELS), as many of one as of the other."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class NerSet:
    """A set without duplicates, and its test split as published beside it.

    `test_published` holds every test sentence; `distinct` are the places in it of those that stand in `test`.
    `counts`: rows as published, duplicates inside the split, rows that are in a split before it (test, validation,
    train), rows kept; by split. `fingerprint` is a hash over everything as published.
    """

    source: str
    train: tuple[Sentence, ...]
    validation: tuple[Sentence, ...]
    test_published: tuple[Sentence, ...]
    distinct: tuple[int, ...]
    counts: dict[str, dict[str, int]]
    fingerprint: str

    @property
    def test(self) -> tuple[Sentence, ...]:
        """The test split, each sentence once."""
        return tuple(self.test_published[place] for place in self.distinct)


def load_ner(source: str, revision: str = "") -> NerSet:
    """Reads and checks a set. FatalError: nothing there, no train or test split, other columns or labels, bad rows.

    RetryableError where the network does not answer.
    """
    published = {split: tuple(_sentences(table, file)) for split, table, file in _tables(source, revision)}
    for split in ("train", "test"):
        if not published.get(split):
            raise FatalError(
                f"{source}: no {split} sentences; the folder needs parquet files named train-… and test-…", source
            )
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[int]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        rows = published.get(split, ())
        kept[split], counts[split] = _distinct(rows, seen)
        seen |= {sentence.words for sentence in rows}
    if not kept["train"]:
        raise FatalError(f"{source}: every train sentence is in the test split too; take another set", source)
    return NerSet(
        source=source,
        train=tuple(published["train"][place] for place in kept["train"]),
        validation=tuple(published["validation"][place] for place in kept["validation"]),
        test_published=published["test"],
        distinct=tuple(kept["test"]),
        counts=counts,
        fingerprint=_fingerprint(published),
    )


def _distinct(rows: tuple[Sentence, ...], seen: set[tuple[str, ...]]) -> tuple[list[int], dict[str, int]]:
    """Places of sentences that are neither in `seen` nor earlier in `rows`, and counts. Words decide, not tags."""
    own: set[tuple[str, ...]] = set()
    kept = []
    elsewhere = 0
    for place, sentence in enumerate(rows):
        if sentence.words in own:
            continue
        own.add(sentence.words)
        if sentence.words in seen:
            elsewhere += 1
        else:
            kept.append(place)
    return kept, {"rows": len(rows), "duplicates": len(rows) - len(own), "in_other_split": elsewhere, "kept": len(kept)}


def _fingerprint(published: dict[str, tuple[Sentence, ...]]) -> str:
    hashes = {
        split: sha256_bytes(canonical_json([[sentence.words, sentence.tags] for sentence in rows]))
        for split, rows in published.items()
    }
    return sha256_bytes(canonical_json(hashes))


# ---- files -------------------------------------------------------------------------------------------------


def _tables(source: str, revision: str) -> Iterator[tuple[str, pa.Table, str]]:
    """(split, its whole table, a name for messages), split by split."""
    url = _url(source, revision)
    try:
        fs, base = fsspec.core.url_to_fs(url)
        files = _split_files(sorted(fs.find(base)), base, source)
        for split, paths in files.items():
            parts = []
            for path in paths:
                with fs.open(path, "rb") as file:
                    parts.append(_columns(pq.ParquetFile(file), path))
            yield split, pa.concat_tables(parts), paths[0]
    except (ConnectionError, TimeoutError) as error:
        raise RetryableError(f"{source} did not answer: {error}", source) from error
    except (OSError, ValueError, ImportError) as error:  # ArrowInvalid is a ValueError
        raise FatalError(
            f"{source} cannot be read as parquet files ({error}); check the folder or URL", source
        ) from error


def _url(source: str, revision: str) -> str:
    """A folder or URL as it is; a hub id as the folder that it is downloaded to."""
    if "://" in source or Path(source).is_dir():
        return source
    if not _HUB_ID.fullmatch(source):
        raise FatalError(f"{source}: no such folder; give a folder, a URL or a hub id such as OWNER/NAME", source)
    # Deferred: a local set needs no HTTP stack.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return str(
            snapshot_download(source, repo_type="dataset", revision=revision or None, allow_patterns="*.parquet")
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FatalError(
            f"{source}: no such folder here and no such set on the hub (or it needs a token); correct the name", source
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise RetryableError(
            f"{source}: no such folder here, and the hub did not answer; a local folder always works", source
        ) from error


def _split_files(paths: list[str], base: str, source: str) -> dict[str, list[str]]:
    """Parquet files by split. FatalError where they are of several sets, which must not be mixed."""
    found: dict[str, list[str]] = defaultdict(list)
    folders = set()
    for path in paths:
        relative = path[len(base) :].lstrip("/")
        if match := _SPLIT_FILE.search(relative):
            found[match[1]].append(path)
            folders.add(relative[: match.start()])
    if len(folders) > 1:
        raise FatalError(f"{source}: several sets are below it ({', '.join(sorted(folders))}); name one", source)
    return found


# ---- rows --------------------------------------------------------------------------------------------------


def _columns(file: pq.ParquetFile, path: str) -> pa.Table:
    """tokens and ner_tags of one file, after a look at their types and at the label names if the file has them."""
    schema = file.schema_arrow
    for name, fits in (("tokens", _is_text), ("ner_tags", pa.types.is_integer)):
        kind = schema.field(name).type if name in schema.names else None
        if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not fits(kind.value_type):
            raise FatalError(
                f"{path}: column {name} should be a list of {'text' if name == 'tokens' else 'integers'} but is "
                f"{kind or 'not there'} (columns: {', '.join(schema.names)}); give a set in the schema of wikiner_fr",
                path,
            )
    names = _label_names(schema)
    if names and tuple(name.removeprefix("I-") for name in names) != LABELS:
        raise FatalError(f"{path}: ner_tags means {names} and not {list(LABELS)}; renumber the tags", path)
    return file.read(["tokens", "ner_tags"]).cast(
        pa.schema([("tokens", pa.list_(pa.string())), ("ner_tags", pa.list_(pa.int64()))])
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _label_names(schema: pa.Schema) -> list[str]:
    """Label names that `datasets` writes beside the columns, or nothing."""
    raw = (schema.metadata or {}).get(b"huggingface")
    feature: Any = json.loads(raw)["info"]["features"].get("ner_tags", {}) if raw else {}
    inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
    return list(inner.get("names") or [])


def _sentences(table: pa.Table, file: str) -> Iterator[Sentence]:
    """Checked rows; those without a single word are left out."""
    columns = zip(table.column("tokens").to_pylist(), table.column("ner_tags").to_pylist(), strict=True)
    for row, (words, tags) in enumerate(columns):
        if not words and not tags:
            continue
        if len(words or ()) != len(tags or ()) or None in words:
            raise FatalError(f"{file}, row {row}: tokens and ner_tags are not of one length; mend the row", file, row)
        if not set(tags) <= set(range(len(LABELS))):
            raise FatalError(
                f"{file}, row {row}: ner_tags has {sorted(set(tags), key=str)} but only 0 to 4 are known "
                f"({', '.join(LABELS)}); give a set in the schema of wikiner_fr",
                file,
                row,
            )
        yield Sentence(tuple(words), tuple(tags))
