"""Computes artifact keys and hashes. Keys are hashes of canonical JSON: equal settings and parents have equal keys.

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
    """Encodes a value as UTF-8 JSON with sorted keys and no spaces. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def sha256_bytes(data: bytes) -> str:
    """Returns the hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Returns the hex sha256 of a local file, which is read in chunks of CHUNK bytes."""
    with open(path, "rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Returns the hex sha256 of an open file, from the current position to the end."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class HashCache:
    """Caches the hashes of local files. A file is read again only if its inode, size or times have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return HashCache, ()  # the copy in another process starts empty

    def sha256(self, path: Path) -> str:
        """Returns the hex sha256 of a file."""
        stat = path.stat()
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._known.get(os.fspath(path))
        if known is None or known[0] != state:
            known = self._known[os.fspath(path)] = (state, sha256_file(path))
        return known[1]


def key_of(stage: str, schema: int, settings: Mapping[str, Any], parents: Iterable[str]) -> str:
    """Returns the key of an artifact: a hash of its stage, schema number, settings and the keys of its parents.

    If the file format or the computation of a stage changes, its schema number must change too, and with it all keys of
    the stage.
    """
    return sha256_bytes(
        canonical_json({"stage": stage, "schema": schema, "settings": dict(settings), "parents": list(parents)})
    )
