"""One look at a corpus folder on any fsspec URL: what files are there now, by one listing, without reading any.

    folder = list_folder("s3://bucket/oscar/2026-10")
    folder.fingerprint                       # changes with any file, so that a copy in progress can be seen
    subfolders("s3://bucket/oscar")          # …/2026-9 before …/2026-10

Called by tasks.snapshot, which says what of it is a source, and by the watcher of new snapshots.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from storage.errors import FatalError
from storage.filesystem import on_this_machine, open_url, translate_errors
from storage.fingerprint import canonical_json, sha256_bytes

_STAMPS = ("ETag", "etag", "mtime", "LastModified", "created")


@dataclass(frozen=True)
class Folder:
    """What one listing saw: path below the folder -> what the file system says of that file."""

    url: str
    fs: fsspec.AbstractFileSystem
    root: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the URL, and name, size and stamp of every file, be it a source or not.

        Unlike a snapshot's it does not trust checksums: their file may come long before what it names.
        """
        listed = [[name, int(detail["size"]), stamp_of(detail)] for name, detail in sorted(self.files.items())]
        return sha256_bytes(canonical_json([self.url, listed]))


def list_folder(url: str) -> Folder:
    """Lists a folder, its subfolders included. `url` may be a link; one inside must lead to a file of the folder.

    FatalError: no such folder, a link that leads out of it or nowhere, a name that is not UTF-8.
    RetryableError: it does not answer.
    """
    with listing_errors(url):
        fs, root = open_url(url)
        fs.invalidate_cache()
        _check_folder(fs, root, url, "corpus.url")
        return Folder(url, fs, root, _list(fs, root, url))


def subfolders(url: str) -> list[str]:
    """URLs of the folders directly below `url`, 2026-9 before 2026-10, without links and hidden ones.

    Errors as `list_folder`.
    """
    with listing_errors(url, "watch.folder"):
        fs, root = open_url(url)
        fs.invalidate_cache()
        _check_folder(fs, root, url, "watch.folder")
        paths = [detail["name"] for detail in fs.ls(root, detail=True) if detail["type"] == "directory"]
    names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names, key=natural) if not name.startswith((".", "_"))]


@contextmanager
def listing_errors(url: str, field: str = "corpus.url") -> Iterator[None]:
    """Turns what a file system raises into the two error types; `field` of the recipe is what they name."""
    try:
        with translate_errors(f"{field} {url}"):
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FatalError(f"{field} {url} cannot be listed: {error}", url) from error


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts part 2 before part 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def stamp_of(detail: Mapping[str, Any]) -> str:
    """ETag or time of change of a file, or "" where the file system tells neither."""
    return str(next((detail[key] for key in _STAMPS if detail.get(key)), "")).strip('"')


def _check_folder(fs: fsspec.AbstractFileSystem, root: str, url: str, field: str) -> None:
    if not fs.isdir(root):
        kind = "a file, not a folder" if fs.exists(root) else "no folder that exists"
        raise FatalError(f"{field} {url} is {kind}; correct it", url)


def _list(fs: fsspec.AbstractFileSystem, root: str, url: str) -> dict[str, dict[str, Any]]:
    """Path below the folder -> what the file system says of that file."""
    local = on_this_machine(fs)
    found = fs.find(root, detail=True, **({"on_error": "raise"} if local else {}))
    base = len(root.rstrip("/")) + 1
    files = {}
    for path, detail in found.items():
        name = path[base:]
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise FatalError(f"{url}: the file name {name[:80]!r} is not UTF-8; rename it", name) from error
        if local and detail["type"] != "file":
            detail = _linked(Path(path), Path(root), name, detail)
        if detail is not None and detail["type"] == "file":
            files[name] = detail
    return files


def _linked(path: Path, root: Path, name: str, detail: dict[str, Any]) -> dict[str, Any]:
    """What a local link leads to. FatalError if it leads out of the folder or nowhere, or is no link but a pipe."""
    if not detail["islink"]:
        raise FatalError(f"{path} is neither a file nor a folder; move it out of the corpus", name)
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(root)) or not target.exists():
        raise FatalError(
            f"{path} is a link that leads out of the corpus folder or nowhere; put the file itself there", name
        )
    if target.is_dir():
        return {"type": "directory"}  # listed under its own name
    return {"name": str(path), "type": "file", "size": target.stat().st_size, "mtime": target.stat().st_mtime}
