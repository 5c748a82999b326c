"""Lists a corpus folder on any fsspec URL: the files that it holds now, by one listing, without reading any.

    folder = list_folder("s3://bucket/oscar/2026-10")
    folder.fingerprint                       # changes with any file, which reveals a copy in progress
    subfolders("s3://bucket/oscar")          # .../2026-9 before .../2026-10

Called by tasks/corpus/snapshot.py, which selects the source files, and by flows/watch.py.
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
from storage.files.filesystem import on_this_machine, open_url, translate_errors
from storage.fingerprint import canonical_json, sha256_bytes

_STAMPS = ("ETag", "etag", "mtime", "LastModified", "created")


@dataclass(frozen=True)
class FolderListing:
    """One listing of a folder. `files` maps the path below the folder to the file system's details of that file."""

    url: str
    fs: fsspec.AbstractFileSystem
    root: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the URL and over name, size and stamp of every file, source or not.

        Unlike the fingerprint of a snapshot it ignores checksums: a checksum file may arrive long before its files.
        """
        listed = [[name, int(detail["size"]), stamp_of(detail)] for name, detail in sorted(self.files.items())]
        return sha256_bytes(canonical_json([self.url, listed]))


def list_folder(url: str) -> FolderListing:
    """Lists a folder and its subfolders. `url` may be a symbolic link; a link inside must point into the folder.

    FatalError: no such folder, a link that leads out of it or is broken, or a file name that is not UTF-8.
    RetryableError: the file system does not answer.
    """
    with listing_errors(url):
        fs, root = open_url(url)
        fs.invalidate_cache()
        _check_folder(fs, root, url, "corpus.url")
        return FolderListing(url, fs, root, _list(fs, root, url))


def subfolders(url: str) -> list[str]:
    """URLs of the folders directly below `url` in natural order, without links and hidden folders.

    Errors as `list_folder`.
    """
    with listing_errors(url, "watch.folder"):
        fs, root = open_url(url)
        fs.invalidate_cache()
        _check_folder(fs, root, url, "watch.folder")
        paths = [detail["name"] for detail in fs.ls(root, detail=True) if detail["type"] == "directory"]
    names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names, key=natural_key) if not name.startswith((".", "_"))]


@contextmanager
def listing_errors(url: str, field: str = "corpus.url") -> Iterator[None]:
    """Translates file-system errors into FatalError and RetryableError; `field` is the recipe field to name in them."""
    try:
        with translate_errors(f"{field} {url}"):
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FatalError(f"{field} {url} cannot be listed: {error}", url) from error


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts part 2 before part 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def stamp_of(detail: Mapping[str, Any]) -> str:
    """ETag or modification time of a file, or "" if the file system provides neither."""
    return str(next((detail[key] for key in _STAMPS if detail.get(key)), "")).strip('"')


def _check_folder(fs: fsspec.AbstractFileSystem, root: str, url: str, field: str) -> None:
    if not fs.isdir(root):
        kind = "a file, not a folder" if fs.exists(root) else "no folder that exists"
        raise FatalError(f"{field} {url} is {kind}; correct it", url)


def _list(fs: fsspec.AbstractFileSystem, root: str, url: str) -> dict[str, dict[str, Any]]:
    """The file system's details of each file, by its path below the folder."""
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
            detail = _resolve_link(Path(path), Path(root), name, detail)
        if detail is not None and detail["type"] == "file":
            files[name] = detail
    return files


def _resolve_link(path: Path, root: Path, name: str, detail: dict[str, Any]) -> dict[str, Any]:
    """Details of the target of a local link. FatalError: it leads out of the folder, is broken, or is a pipe."""
    if not detail["islink"]:
        raise FatalError(f"{path} is neither a file nor a folder; move it out of the corpus", name)
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(root)) or not target.exists():
        raise FatalError(
            f"{path} is a link that leads out of the corpus folder or nowhere; put the file itself there", name
        )
    if target.is_dir():
        return {"type": "directory"}  # its files are listed under their own names
    return {"name": str(path), "type": "file", "size": target.stat().st_size, "mtime": target.stat().st_mtime}
