"""Files under one root, local or remote: paths, listings, reading, writing and deleting, with our two error types.

    files = Files("s3://bucket/prefix")
    files.find("receipts")                       # every file below a folder
    files.each(files.remove, paths)              # of a remote root several requests at a time

What passes by itself is tried again on a remote root. storage/store.py keeps artifacts in it.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storage.disk import write_file
from storage.errors import FatalError
from storage.filesystem import files_below, on_this_machine, open_url, translate_errors, with_retries, write_object
from storage.fingerprint import canonical_json

S = TypeVar("S")

T = TypeVar("T")

READERS = 16
"""Files of a remote store that are read or deleted at a time: each is a round trip of milliseconds, and there may be
20,000."""


class Files:
    """One root. FatalError: it cannot be opened, because its package is not installed or it holds a password."""

    def __init__(self, root: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.root = os.fspath(root)
        self.fs, self._base = open_url(self.root, options)
        self.is_local = on_this_machine(self.fs)

    def path(self, relative: str) -> str:
        """The path that the file system knows for a path below the root."""
        return f"{self._base.rstrip('/')}/{relative}"

    @contextmanager
    def access(self) -> Iterator[None]:
        """Turns what a file system raises into the two error types; FileNotFoundError of one file passes."""
        with translate_errors(f"the store {self.root}"):
            yield

    def find(self, relative: str) -> dict[str, dict[str, Any]]:
        """Every file below a folder: path below the root -> size, mtime… as the file system says."""
        self.fs.invalidate_cache()
        found = self.patiently(partial(files_below, self.fs, self.path(relative)))
        base = len(self.path(""))
        return {path[base:]: detail for path, detail in found.items()}

    def remove(self, relative: str) -> None:
        """Deletes one file, if it is there."""
        self._remove(relative)

    def remove_all(self, relatives: Iterable[str]) -> None:
        """Deletes files, as far as they are there.

        One a request: servers do not agree on requests for a thousand, and s3fs says nothing of what is refused in one.
        """
        for _ in self.each(self._remove, relatives):
            pass

    def each(self, call: Callable[[S], T], things: Iterable[S]) -> Iterator[T]:
        """`call` of each thing, in their order; of a remote store READERS of them at a time."""
        if self.is_local:
            yield from map(call, things)
        else:
            with ThreadPoolExecutor(READERS, thread_name_prefix="store") as pool:
                yield from pool.map(call, things)

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """A JSON object at a path below the root, or None where there is no file."""
        path = self.path(relative)
        try:
            value = json.loads(self._read(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FatalError(f"{path}: not JSON ({error}); delete the file", path) from error
        if not isinstance(value, dict):
            raise FatalError(f"{path}: not a JSON object; delete the file", path)
        return value

    def write_json(self, relative: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON object whole or not at all."""
        self._write(relative, canonical_json(dict(value)))

    def patiently(self, call: Callable[[], T]) -> T:
        """`call` with the errors of `access`; of a remote store again after a pause if the error may pass."""

        def once() -> T:
            with self.access():
                return call()

        return once() if self.is_local else with_retries(once)

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            paths = self.patiently(partial(self.fs.ls, self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def _read(self, path: str) -> bytes:
        data: bytes = self.patiently(partial(self.fs.cat_file, path))
        return data

    def _write(self, relative: str, data: bytes) -> None:
        path = self.path(relative)
        if self.is_local:
            self.patiently(partial(write_file, Path(path), data))
        else:
            self.patiently(partial(write_object, self.fs, path, data))

    def _remove(self, relative: str) -> None:
        try:
            self.patiently(partial(self.fs.rm_file, self.path(relative)))
        except FileNotFoundError:
            return
