"""Locates the files of an evaluation set (local folder, fsspec URL or hub id) and reads its parquet files.

    location = SetLocation("facebook/xnli", "fr")     # or SetLocation("/data/xnli/fr"), SetLocation("s3://bucket/xnli")
    for split, table, file in parquet_splits(location, read):
        ...

Parquet files are named by split: train-00000-of-00001.parquet, test.parquet or train/0000.parquet.
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
from storage.files.filesystem import client_errors, is_remote_error, open_url, translated
from storage.hub import DATA_SET, download_repository, is_hub_id

_SPLIT_FILE = re.compile(r"(?:^|/)(train|validation|test)(?:[-.][^/]*)?(?:/[^/]*)?\.parquet$")


@dataclass(frozen=True)
class SetLocation:
    """Location of an evaluation set: a folder, URL or hub id (`source`), and the folder below it that contains the set.

    `revision` is used for hub ids only.
    """

    source: str
    folder: str = ""
    revision: str = ""


def url_of(location: SetLocation, pattern: str) -> str:
    """Returns the folder or URL of the set; for a hub id, first downloads the files that match `pattern`.

    FatalError if the source is neither a folder, a URL nor a hub id, if the hub has no such data set, or if the data
    set must be downloaded in offline mode. RetryableError if the hub does not respond.
    """
    source = location.source
    if "://" not in source and not Path(source).is_dir():
        if not is_hub_id(source) or Path(source).exists():
            raise FatalError(
                f"{source}: no such folder; correct score.sets, or the hub id (such as OWNER/NAME) in the protocol",
                source,
            )
        full_pattern = f"{location.folder}/{pattern}" if location.folder else pattern
        source = str(download_repository(DATA_SET, source, location.revision, (full_pattern,)))
    return f"{source.rstrip('/')}/{location.folder}" if location.folder else source


@contextmanager
def translate_read_errors(source: str) -> Iterator[None]:
    """Converts read errors to FatalError, or to RetryableError if the network does not respond."""
    try:
        yield
    except client_errors(ValueError) as error:  # ArrowInvalid is a ValueError
        remote = translated(error, source) if not isinstance(error, ValueError) and is_remote_error(error) else None
        if remote:
            raise remote from error
        raise FatalError(f"{source} cannot be read ({error}); check the folder or URL and its files", source) from error


def parquet_splits(
    location: SetLocation, read: Callable[[pq.ParquetFile, str], pa.Table]
) -> Iterator[tuple[str, pa.Table, str]]:
    """Yields the name of each split, its table, and the path of its first file for error messages.

    `read(file, path)` reads one file. FatalError if files cannot be read or belong to several data sets.
    """
    url = url_of(location, "*.parquet")
    with translate_read_errors(location.source):
        fs, base = open_url(url)
        for split, paths in _split_files(sorted(fs.find(base)), base, location.source).items():
            parts = []
            for path in paths:
                with fs.open(path, "rb") as file:
                    parts.append(read(pq.ParquetFile(file), path))
            yield split, pa.concat_tables(parts), paths[0]


def _split_files(paths: list[str], base: str, source: str) -> dict[str, list[str]]:
    files: dict[str, list[str]] = defaultdict(list)
    folders = set()
    for path in paths:
        relative = path[len(base) :].lstrip("/")
        if match := _SPLIT_FILE.search(relative):
            files[match[1]].append(path)
            folders.add(relative[: match.start()])
    if len(folders) > 1:
        raise FatalError(
            f"{source}: contains several data sets ({', '.join(sorted(folders))}); select one by its folder in the "
            "protocol",
            source,
        )
    return files


def label_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the label names in the metadata that the `datasets` library writes; empty without such metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    feature: Any = json.loads(raw)["info"]["features"].get(column, {}) if raw else {}
    inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
    return tuple(inner.get("names") or ())


def is_text(kind: pa.DataType) -> bool:
    """Returns True if the type is one of the two Arrow string types."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
