"""Artifact keys and hashes: sha256 over canonical JSON, so that equal settings and parents always give equal keys.

key = key_of("blocks", schema=1, settings={"length": 512}, parents=[shard.key])
sha256_file("part_1.jsonl.gz")
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a local file, read in chunks of CHUNK bytes."""
    with open(path, "rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Hex sha256 of the rest of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class HashCache:
    """Hashes of local files; a file is read once per process for as long as its inode, size and times are unchanged."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return HashCache, ()  # a copy in another process starts empty

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file."""
        stat = path.stat()
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._known.get(os.fspath(path))
        if known is None or known[0] != state:
            known = self._known[os.fspath(path)] = (state, sha256_file(path))
        return known[1]


def key_of(stage: str, schema: int, settings: Mapping[str, Any], parents: Iterable[str]) -> str:
    """The key of an artifact: a hash of its stage, the stage's schema number, its settings and the keys of its parents.

    A change of the file format or of the computation needs a new schema number, which changes every key of the stage.
    """
    return sha256_bytes(
        canonical_json({"stage": stage, "schema": schema, "settings": dict(settings), "parents": list(parents)})
    )
