"""Lists the current files of a corpus folder at any fsspec URL, without reading them.

    folder = list_folder("s3://bucket/oscar/2026-10")
    folder.fingerprint                       # changes with any file, so it reveals a copy in progress
    subfolders("s3://bucket/oscar")          # .../2026-9 before .../2026-10

tasks/corpus/snapshot.py selects the source files of a listing; flows/watch.py compares listings.
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
    """One listing of a folder. `files` maps the path of each file below the folder to its file-system details."""

    url: str
    fs: fsspec.AbstractFileSystem
    root: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the URL and over the name, size and stamp of every file, source or not.

        Unlike the fingerprint of a snapshot, it ignores checksums, since a checksum file may arrive long before the
        files that it lists.
        """
        listed = [[name, int(detail["size"]), stamp_of(detail)] for name, detail in sorted(self.files.items())]
        return sha256_bytes(canonical_json([self.url, listed]))


def list_folder(url: str) -> FolderListing:
    """Lists a folder and its subfolders. `url` may be a symbolic link; links in the folder must point into the folder.

    Raises FatalError if the folder does not exist, a link in it is broken or points outside it, or a file name is not
    UTF-8. Raises RetryableError if the file system does not respond.
    """
    with listing_errors(url):
        fs, root = open_url(url)
        fs.invalidate_cache()
        _check_folder(fs, root, url, "corpus.url")
        return FolderListing(url, fs, root, _list(fs, root, url))


def subfolders(url: str) -> list[str]:
    """Returns the URLs of the folders directly below `url`, in natural order, without links and hidden folders.

    Raises the same errors as `list_folder`.
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
    """Translates file-system errors into FatalError and RetryableError. `field` is the recipe field in the messages."""
    try:
        with translate_errors(f"{field} {url}"):
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FatalError(f"{field} {url} cannot be listed ({error}); correct {field}", url) from error


def natural_key(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that orders part 2 before part 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def stamp_of(detail: Mapping[str, Any]) -> str:
    """Returns the ETag or the modification time of a file, or "" if the file system provides neither."""
    return str(next((detail[key] for key in _STAMPS if detail.get(key)), "")).strip('"')


def _check_folder(fs: fsspec.AbstractFileSystem, root: str, url: str, field: str) -> None:
    if not fs.isdir(root):
        fault = "is a file, not a folder" if fs.exists(root) else "does not exist"
        raise FatalError(f"{field} {url} {fault}; correct {field}", url)


def _list(fs: fsspec.AbstractFileSystem, root: str, url: str) -> dict[str, dict[str, Any]]:
    """Returns the file-system details of each file, by path below the folder."""
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
    """Returns the details of the target of a local link.

    Raises FatalError if the link is broken or points outside the folder, or if `path` is a special file such as a pipe.
    """
    if not detail["islink"]:
        raise FatalError(f"{path} is neither a file nor a folder; remove it from the corpus folder", name)
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(root)) or not target.exists():
        raise FatalError(
            f"{path} is a link that is broken or points outside the corpus folder; replace it by the file", name
        )
    if target.is_dir():
        return {"type": "directory"}  # the files in it are listed under their own names
    return {"name": str(path), "type": "file", "size": target.stat().st_size, "mtime": target.stat().st_mtime}
