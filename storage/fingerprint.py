"""Keys: sha256 over canonical JSON, so that the same settings and parents always name the same artifact."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; NaN and infinity are refused (ValueError)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a local file, read in chunks of 1 MB."""
    with open(path, "rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Hex sha256 of what is left of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class Hashes:
    """sha256 of local files, each read once in this process for as long as it stays as it is."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Hashes, ()  # another process looks for itself

    def of(self, path: Path) -> str:
        """Hex sha256 of a file; reads it again only if its inode, size or times are others than they were."""
        found = path.stat()
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        before = self._known.get(os.fspath(path))
        if before is None or before[0] != state:
            before = self._known[os.fspath(path)] = (state, sha256_file(path))
        return before[1]


def sha256_files(paths: Iterable[Path]) -> str:
    """Hex sha256 over the names and contents of local files, in the order of their names."""
    named = sorted((path.name, sha256_file(path)) for path in paths)
    return sha256_bytes(canonical_json(named))


def key_of(stage: str, schema: int, settings: Mapping[str, Any], parents: Iterable[str]) -> str:
    """The key of an artifact: what made it, from what, under which schema number (DESIGN: "What passes along")."""
    return sha256_bytes(
        canonical_json({"stage": stage, "schema": schema, "settings": dict(settings), "parents": list(parents)})
    )
