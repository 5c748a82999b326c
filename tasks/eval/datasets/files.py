"""Where the files of an evaluation set are: a local folder, any fsspec URL, or a hub id; and its parquet tables.

    place = Place("facebook/xnli", "fr")              # or Place("/data/eval/xnli/fr"), Place("s3://bucket/xnli/fr")
    for split, table, file in parquet_splits(place, read): ...

A folder holds parquet files named by split: train-00000-of-00001.parquet, test.parquet, train/0000.parquet. Called by
tasks.pair_set, tasks.ner_set and tasks.cls_set.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from storage.filesystem import client_errors, is_remote_error, open_url, translated
from storage.hub import DATA_SET, download_repository, is_hub_id

_SPLIT_FILE = re.compile(r"(?:^|/)(train|validation|test)(?:[-.][^/]*)?(?:/[^/]*)?\.parquet$")


@dataclass(frozen=True)
class Place:
    """A folder, a URL or a hub id; the folder below it that holds the set; the revision, for the hub."""

    source: str
    folder: str = ""
    revision: str = ""


def url_of(place: Place, pattern: str) -> str:
    """The folder or URL of the set; a hub id becomes the folder that files named like `pattern` are downloaded to.

    FatalError: neither a folder nor a hub id, no such set, or offline. RetryableError: the hub does not answer.
    """
    source = place.source
    if "://" not in source and not Path(source).is_dir():
        if not is_hub_id(source) or Path(source).exists():
            raise FatalError(f"{source}: no such folder; give a folder, a URL or a hub id such as OWNER/NAME", source)
        wanted = f"{place.folder}/{pattern}" if place.folder else pattern
        source = str(download_repository(DATA_SET, source, place.revision, (wanted,)))
    return f"{source.rstrip('/')}/{place.folder}" if place.folder else source


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What goes wrong with files inside becomes FatalError, or RetryableError where the network does not answer."""
    try:
        yield
    except client_errors(ValueError) as error:  # ArrowInvalid is a ValueError
        ours = translated(error, source) if not isinstance(error, ValueError) and is_remote_error(error) else None
        if ours:
            raise ours from error
        raise FatalError(f"{source} cannot be read ({error}); check the folder or URL and its files", source) from error


def parquet_splits(
    place: Place, read: Callable[[pq.ParquetFile, str], pa.Table]
) -> Iterator[tuple[str, pa.Table, str]]:
    """(split, its whole table, the first file's name for messages), split by split; `read` takes one file each time.

    FatalError: nothing that can be read, or files of several sets, which must not be mixed.
    """
    url = url_of(place, "*.parquet")
    with reading(place.source):
        fs, base = open_url(url)
        for split, paths in _split_files(sorted(fs.find(base)), base, place.source).items():
            parts = []
            for path in paths:
                with fs.open(path, "rb") as file:
                    parts.append(read(pq.ParquetFile(file), path))
            yield split, pa.concat_tables(parts), paths[0]


def _split_files(paths: list[str], base: str, source: str) -> dict[str, list[str]]:
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


def label_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Label names that `datasets` writes beside the columns, or nothing."""
    raw = (schema.metadata or {}).get(b"huggingface")
    feature: Any = json.loads(raw)["info"]["features"].get(column, {}) if raw else {}
    inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
    return tuple(inner.get("names") or ())


def is_text(kind: pa.DataType) -> bool:
    """True for both Arrow types of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
