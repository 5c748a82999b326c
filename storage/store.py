"""The store: artifacts under any fsspec URL, each as data written first and a receipt written last.

    store = Store("/data/distil/store")            # or s3://bucket/prefix, memory://name
    with store.scratch() as folder:
        ...write files into folder...
        receipt = store.commit(ref, folder, rows=…, tokens=…, settings=…, parents=…)

No receipt means that the artifact does not exist. Two writers of one key do no harm: the data of each has a name
of its own, and the last receipt wins and refers to whole files.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec

from storage import layout
from storage.artifact import (
    DataFile,
    Failure,
    Receipt,
    Ref,
    content_of,
    failure_from_json,
    receipt_from_json,
)
from storage.error import DistilError, FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes, sha256_file

LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch")
_FATAL_CODES = {
    errno.ENOSPC: "is full; make space there or name another store",
    errno.EDQUOT: "is over its quota; make space there or name another store",
    errno.EROFS: "is read-only; make it writable or name another store",
}


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store:
    """Artifacts under one root. `cache` is where files of a remote root are kept while they are read."""

    def __init__(
        self, root: str | os.PathLike[str], options: Mapping[str, Any] | None = None, cache: Path | None = None
    ) -> None:
        self.root = os.fspath(root)
        self.fs, self._base = fsspec.core.url_to_fs(self.root, **dict(options or {}))
        protocols = self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)
        self.is_local = "file" in protocols
        self.cache = cache or Path(tempfile.gettempdir()) / f"distil-cache-{os.getuid()}"

    def path(self, relative: str) -> str:
        """The path that the file system knows for a path inside the store."""
        return f"{self._base.rstrip('/')}/{relative}"

    # ---- what is there -------------------------------------------------------------------------------------

    def has(self, ref: Ref) -> bool:
        """True if a receipt of `ref` and data are there, as `keys` counts; looks at this one artifact only."""
        with self.access():
            if not self.fs.exists(self.path(layout.receipt_path(ref.kind, ref.key))):
                return False
        return bool(self.find(layout.key_folder(ref.kind, ref.key)))

    def receipt(self, ref: Ref) -> Receipt:
        """The receipt of `ref`. FatalError if there is none, or if it is damaged or belongs to another artifact."""
        path = self.path(layout.receipt_path(ref.kind, ref.key))
        try:
            data = self._read(path)
        except FileNotFoundError as error:
            raise FatalError(f"{ref.kind} {ref.label} is not in the store {self.root}; run `distil retry`") from error
        receipt = receipt_from_json(data, path)
        if (receipt.kind, receipt.key) != (ref.kind, ref.key):
            raise FatalError(
                f"{path}: this receipt is of {receipt.kind} {receipt.label}, not of {ref.label}; run `distil verify`",
                path,
            )
        return receipt

    def keys(self, kind: str) -> set[str]:
        """Keys of `kind` that have a receipt and data, by two listings; reads no receipt."""
        with_receipt = {
            name.removesuffix(layout.RECEIPT)
            for name in self._names(layout.receipts_folder(kind))
            if name.endswith(layout.RECEIPT)
        }
        # Files, not folders: an empty folder of deleted data is no artifact.
        return with_receipt & {path.split("/")[2] for path in self.find(layout.data_folder(kind))}

    def missing(self, refs: Iterable[Ref]) -> list[Ref]:
        """Those of `refs` that are not there, in their order: the retry list."""
        wanted = list(refs)
        there = {kind: self.keys(kind) for kind in {ref.kind for ref in wanted}}
        return [ref for ref in wanted if ref.key not in there[ref.kind]]

    def receipts(self, kind: str) -> Iterator[Receipt]:
        """Every receipt of `kind`, in the order of keys (reads each)."""
        for name in sorted(self._names(layout.receipts_folder(kind))):
            if name.endswith(layout.RECEIPT):
                yield self.receipt(Ref(kind, name.removesuffix(layout.RECEIPT), name))

    def failures(self, kind: str) -> list[Failure]:
        """Failures of `kind` that no later success has removed."""
        paths = [
            self.path(f"{layout.receipts_folder(kind)}/{name}")
            for name in sorted(self._names(layout.receipts_folder(kind)))
            if name.endswith(layout.FAILURE)
        ]
        return [failure_from_json(self._read(path), path) for path in paths]

    # ---- commit --------------------------------------------------------------------------------------------

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty local folder to write an artifact into; it is gone afterwards, committed or not."""
        with self.access():
            parent = Path(self.path(layout.scratch_folder())) if self.is_local else self.cache
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="work-", dir=parent))
        try:
            yield folder
        except OSError as error:
            # Only a full or read-only disk is the store's own; other errors belong to whoever writes here.
            if error.errno in _FATAL_CODES:
                raise FatalError(f"the store {self.root} {_FATAL_CODES[error.errno]} ({error})") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(
        self,
        ref: Ref,
        folder: Path,
        *,
        schema: int,
        rows: int,
        tokens: int,
        settings: Mapping[str, Any],
        parents: Iterable[str],
        info: Mapping[str, Any] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> Receipt:
        """Moves every file of `folder` into the store, then writes the receipt. Subfolders are kept as names."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise ValueError(f"nothing to commit for {ref.kind} {ref.label}")
        files = tuple(
            DataFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path)) for path in paths
        )
        receipt = Receipt(
            kind=ref.kind,
            key=ref.key,
            label=ref.label,
            schema=schema,
            files=files,
            rows=rows,
            tokens=tokens,
            parents=tuple(parents),
            settings=dict(settings),
            info=dict(info or {}),
            versions=_versions(),
            timings={name: round(seconds, 3) for name, seconds in (timings or {}).items()},
            host=socket.gethostname(),
            created=now(),
        )
        with self.access():
            target = self.path(layout.content_folder(ref.kind, ref.key, content_of(files)))
            if self.is_local:
                _move_folder(folder, files, Path(target))
            else:
                for file in files:
                    self.fs.put_file(os.fspath(folder / file.name), f"{target}/{file.name}")
        self._write(layout.receipt_path(ref.kind, ref.key), receipt.to_json())
        self._remove(layout.failure_path(ref.kind, ref.key))
        return receipt

    def fail(self, ref: Ref, error: Exception) -> Failure:
        """Notes why `ref` could not be made."""
        failure = Failure(
            kind=ref.kind,
            key=ref.key,
            label=ref.label,
            error=type(error).__name__,
            message=str(error),
            retryable=not isinstance(error, FatalError),
            file=error.file if isinstance(error, DistilError) else "",
            line=error.line if isinstance(error, DistilError) else None,
            host=socket.gethostname(),
            created=now(),
        )
        self._write(layout.failure_path(ref.kind, ref.key), canonical_json(asdict(failure)))
        return failure

    def withdraw(self, ref: Ref) -> None:
        """Takes the receipt back: from now on the artifact does not exist. The data stays for `gc`."""
        self._remove(layout.receipt_path(ref.kind, ref.key))

    def drop_data(self, receipt: Receipt) -> None:
        """Deletes the files of an artifact whose receipt was withdrawn."""
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        for file in receipt.files:
            self._remove(f"{folder}/{file.name}")
        if self.is_local:
            shutil.rmtree(self.path(layout.key_folder(receipt.kind, receipt.key)), ignore_errors=True)

    # ---- reading -------------------------------------------------------------------------------------------

    def local(self, receipt: Receipt) -> Path:
        """A local folder that holds the artifact's files; of a remote store they are copied into the cache first.

        Sizes are checked here, hashes by `check`. FatalError if a file is gone or has another size.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        here = Path(self.path(folder)) if self.is_local else self.cache / sha256_bytes(self.root.encode())[:8] / folder
        for file in receipt.files:
            path = here / file.name
            if not self.is_local and not (path.exists() and path.stat().st_size == file.size):
                self._fetch(self.path(f"{folder}/{file.name}"), path)
            if not path.exists() or path.stat().st_size != file.size:
                raise FatalError(
                    f"{receipt.kind} {receipt.label}: {path} is gone or has another size than its receipt says; "
                    "run `distil verify`",
                    os.fspath(path),
                )
        return here

    def check(self, receipt: Receipt) -> Path:
        """Like `local`, and hashes every file. FatalError that names the first file that differs."""
        folder = self.local(receipt)
        for file in receipt.files:
            is_whole = sha256_file(folder / file.name) == file.sha256
            if not is_whole and not self.is_local:
                # The copy in the cache may be what is wrong, not the store.
                (folder / file.name).unlink()
                is_whole = sha256_file(self.local(receipt) / file.name) == file.sha256
            if not is_whole:
                raise FatalError(
                    f"{receipt.kind} {receipt.label}: the bytes of {folder / file.name} are not those of its receipt; "
                    "run `distil verify`",
                    os.fspath(folder / file.name),
                )
        return folder

    def note(self, topic: str, name: str, value: Mapping[str, Any]) -> None:
        """Remembers a small fact; `name` may be any text."""
        self._write(layout.note_path(topic, sha256_bytes(name.encode())), canonical_json(dict(value)))

    def noted(self, topic: str, name: str) -> dict[str, Any] | None:
        """What was remembered under this name, or None."""
        return self.read_json(layout.note_path(topic, sha256_bytes(name.encode())))

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """A JSON object at a path inside the store, or None where there is no file."""
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

    # ---- the file system -----------------------------------------------------------------------------------

    @contextmanager
    def access(self) -> Iterator[None]:
        """Turns what a file system raises into the two error types; FileNotFoundError passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (ConnectionError, TimeoutError) as error:
            raise RetryableError(f"the store {self.root} did not answer: {error}") from error
        except PermissionError as error:
            raise FatalError(f"the store {self.root} may not be written or read: {error}") from error
        except OSError as error:
            if error.errno in _FATAL_CODES:
                raise FatalError(f"the store {self.root} {_FATAL_CODES[error.errno]} ({error})") from error
            raise RetryableError(f"the store {self.root} failed: {error}") from error

    def find(self, relative: str) -> dict[str, dict[str, Any]]:
        """Every file below a folder of the store: path inside the store -> size, mtime… as the file system says."""
        self.fs.invalidate_cache()
        with self.access():
            found = self.fs.find(self.path(relative), detail=True)
        base = len(self.path(""))
        return {path[base:]: detail for path, detail in found.items()}

    def remove(self, relative: str) -> None:
        """Deletes one file, if it is there."""
        self._remove(relative)

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            with self.access():
                return [path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.path(folder), detail=False)]
        except FileNotFoundError:
            return []

    def _read(self, path: str) -> bytes:
        with self.access():
            data: bytes = self.fs.cat_file(path)
            return data

    def _write(self, relative: str, data: bytes) -> None:
        with self.access():
            path = self.path(relative)
            if self.is_local:
                _write_file(Path(path), data)
            else:
                self.fs.pipe_file(path, data)

    def _remove(self, relative: str) -> None:
        with self.access():
            try:
                self.fs.rm_file(self.path(relative))
            except FileNotFoundError:
                return

    def _fetch(self, remote: str, path: Path) -> None:
        """Copies a remote file under a temporary name first, so that a cut-off copy is never taken for whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".fetch-", dir=path.parent)
        os.close(handle)
        try:
            with self.access():
                self.fs.get_file(remote, temporary)
            os.replace(temporary, path)
        except FileNotFoundError as error:
            raise FatalError(f"{remote} is gone from the store; run `distil verify`", remote) from error
        finally:
            Path(temporary).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _move_folder(folder: Path, files: tuple[DataFile, ...], target: Path) -> None:
    """Renames each file into place and forces it to disk: after this returns, a power cut loses nothing."""
    for file in files:
        source, final = folder / file.name, target / file.name
        _fsync(source)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, final)
    for parent in {(target / file.name).parent for file in files} | {target, target.parent, target.parent.parent}:
        _fsync(parent)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".write-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
