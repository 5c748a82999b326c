"""Lists, reads, writes and deletes files under one local or remote root.

    files = Files("s3://bucket/prefix")
    files.find("receipts")                       # every file below a folder
    files.write_json("notes/x.json", {"a": 1})

All errors are FatalError or RetryableError. Requests to a remote root are retried before RetryableError is raised.
`Files` is a base class of storage.store.Store.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storage.errors import FatalError
from storage.files.disk import write_file
from storage.files.filesystem import (
    files_below,
    on_this_machine,
    open_url,
    translate_errors,
    with_retries,
    write_object,
)
from storage.fingerprint import canonical_json

S = TypeVar("S")

T = TypeVar("T")

PARALLEL_REQUESTS = 16
"""Number of parallel requests to a remote store, where a run may send 20,000 requests of some milliseconds each."""


class Files:
    """The files under one root; all paths are relative to the root.

    Raises FatalError if the package of the protocol is not installed or the URL contains a password.
    """

    def __init__(self, root: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.root = os.fspath(root)
        self.fs, self._base = open_url(self.root, options)
        self.is_local = on_this_machine(self.fs)

    def path(self, relative: str) -> str:
        """Returns the path in the file system for a path relative to the root."""
        return f"{self._base.rstrip('/')}/{relative}"

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Translates file-system errors into FatalError and RetryableError. FileNotFoundError passes through."""
        with translate_errors(f"the store {self.root}"):
            yield

    def find(self, relative: str) -> dict[str, dict[str, Any]]:
        """Returns size, modification time and other details of each file below a folder, by relative path."""
        self.fs.invalidate_cache()
        found = self.request(partial(files_below, self.fs, self.path(relative)))
        base = len(self.path(""))
        return {path[base:]: detail for path, detail in found.items()}

    def remove(self, relative: str) -> None:
        """Deletes a file if it exists."""
        self._remove(relative)

    def remove_all(self, relatives: Iterable[str]) -> None:
        """Deletes the files that exist.

        Sends one request per file: servers differ in bulk deletion, and s3fs does not report the files that remain.
        """
        for _ in self.parallel_map(self._remove, relatives):
            pass

    def parallel_map(self, call: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Yields the results of `call` in the order of items; a remote store runs PARALLEL_REQUESTS calls at once."""
        if self.is_local:
            yield from map(call, items)
        else:
            with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="store") as pool:
                yield from pool.map(call, items)

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """Returns the JSON object in a file, or None if the file does not exist. Raises FatalError if it is damaged."""
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
        """Writes a JSON object atomically."""
        self._write(relative, canonical_json(dict(value)))

    def request(self, call: Callable[[], T]) -> T:
        """Returns the result of `call`, with translated errors. For a remote store, RetryableError is retried."""

        def once() -> T:
            with self.translate_errors():
                return call()

        return once() if self.is_local else with_retries(once)

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            paths = self.request(partial(self.fs.ls, self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def _read(self, path: str) -> bytes:
        data: bytes = self.request(partial(self.fs.cat_file, path))
        return data

    def _write(self, relative: str, data: bytes) -> None:
        path = self.path(relative)
        if self.is_local:
            self.request(partial(write_file, Path(path), data))
        else:
            self.request(partial(write_object, self.fs, path, data))

    def _remove(self, relative: str) -> None:
        try:
            self.request(partial(self.fs.rm_file, self.path(relative)))
        except FileNotFoundError:
            return
