"""The store: artifacts under any fsspec URL, each as data written first and a receipt written last.

    store = Store("/data/distil/store")            # or s3://bucket/prefix, memory://name
    with store.scratch() as folder:
        ...write files into folder...
        receipt = store.commit(ref, folder, rows=…, tokens=…, settings=…, parents=…)

No receipt means that the artifact does not exist. Two writers of one key do no harm: the data of each has a name
of its own, and the last receipt wins and refers to whole files. An object store needs no more than that: nothing is
renamed there, nothing is written on condition, and the size of every file is asked for before its receipt is written.

Whoever makes something of an artifact hashes it first: `check`, or `hold(receipt, check=True)`. A file is hashed once
in a process, so asking again costs nothing.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from storage import layout
from storage.artifact import (
    DataFile,
    Failure,
    Receipt,
    Ref,
    digest_of_files,
    failure_from_json,
    is_key,
    receipt_from_json,
)
from storage.cache import LIMIT, Cache, PinnedFolder
from storage.disk import move_files, writing
from storage.errors import DamagedError, DistilError, FatalError, RetryableError
from storage.filesystem import download_file, translate_errors, upload, with_retries
from storage.fingerprint import Hashes, canonical_json, sha256_bytes, sha256_file
from storage.root import Files


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store(Files):
    """Artifacts under one root. Copies of a remote root's files are kept in `cache`, up to `cache_bytes` of them.

    FatalError: a root that cannot be opened, because its package is not installed or it holds a password.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        cache: Path | None = None,
        cache_bytes: int = LIMIT,
    ) -> None:
        super().__init__(root, options)
        self.cache = Cache(cache or Path(tempfile.gettempdir()) / f"distil-{os.getuid()}" / "cache", cache_bytes)
        self._hashes = Hashes()

    # ---- what is there -------------------------------------------------------------------------------------

    def has(self, ref: Ref) -> bool:
        """True if a receipt of `ref` and data are there, as `keys` counts; looks at this one artifact only."""
        receipt = self.path(layout.receipt_path(ref.kind, ref.key))
        try:
            # Not `exists`, which for some file systems is False after any error.
            self.patiently(partial(self.fs.info, receipt))
        except FileNotFoundError:
            return False
        return bool(self.find(layout.key_folder(ref.kind, ref.key)))

    def receipt(self, ref: Ref) -> Receipt:
        """The receipt of `ref`. FatalError if there is none; DamagedError as of `receipt_if_there`."""
        receipt = self.receipt_if_there(ref)
        if receipt is None:
            raise FatalError(f"{ref.kind} {ref.label} is not in the store {self.root}; run `distil retry`")
        return receipt

    def receipt_if_there(self, ref: Ref) -> Receipt | None:
        """The receipt of `ref`, or None where there is none. DamagedError if it is damaged or of another artifact."""
        path = self.path(layout.receipt_path(ref.kind, ref.key))
        try:
            receipt = self.patiently(partial(self._read_receipt, path))
        except FileNotFoundError:
            return None
        except FatalError as error:  # damaged, or it may not be read
            raise type(error)(f"{ref.kind} {ref.label}: {error}", path) from error
        if (receipt.kind, receipt.key) != (ref.kind, ref.key):
            raise DamagedError(
                f"{ref.kind} {ref.label}: {path}: this receipt is of {receipt.kind} {receipt.label}, "
                f"not of {ref.label}; run `distil verify`",
                path,
            )
        return receipt

    def keys(self, kind: str) -> set[str]:
        """Keys of `kind` that have a receipt and data, by two listings; reads no receipt."""
        return set(self.sizes(kind))

    def sizes(self, kind: str) -> dict[str, int]:
        """Bytes of data by key of every artifact of `kind` that is there, by the same two listings."""
        with_receipt = set(self.receipt_keys(kind))
        found: dict[str, int] = {}
        # Files, not folders: an empty folder of deleted data is no artifact.
        for path, detail in self.find(layout.data_folder(kind)).items():
            key = path.split("/")[2]
            if key in with_receipt:
                found[key] = found.get(key, 0) + int(detail["size"])
        return found

    def missing(self, refs: Iterable[Ref]) -> list[Ref]:
        """Those of `refs` that are not there, in their order: the retry list."""
        wanted = list(refs)
        there = self._there(wanted)
        return [ref for ref in wanted if ref.key not in there[ref.kind]]

    def receipts_of(self, refs: Iterable[Ref]) -> list[Receipt]:
        """Receipts of those of `refs` that are there, in their order; what is there is asked by listings, as `keys`.

        One that goes away between the listing and the read was not there: who asks gets what they would a moment later.
        """
        wanted = list(refs)
        there = self._there(wanted)
        return list(self._read_all(ref for ref in wanted if ref.key in there[ref.kind]))

    def _read_all(self, refs: Iterable[Ref]) -> Iterator[Receipt]:
        """Receipts in the order of `refs`, which were listed; without those that are gone since."""
        for receipt in self.each(self.receipt_if_there, refs):
            if receipt is not None:
                yield receipt

    def _there(self, refs: Iterable[Ref]) -> dict[str, set[str]]:
        return {kind: self.keys(kind) for kind in {ref.kind for ref in refs}}

    def receipts(self, kind: str) -> Iterator[Receipt]:
        """Every receipt of `kind`, in the order of keys (reads each), as `receipts_of` does."""
        return self._read_all(Ref(kind, key, key[:12]) for key in self.receipt_keys(kind))

    def receipt_keys(self, kind: str) -> list[str]:
        """Keys of `kind` that have a receipt, with or without data, in order; reads none."""
        names = self._names(layout.receipts_folder(kind))
        keys = (name.removesuffix(layout.RECEIPT) for name in names if name.endswith(layout.RECEIPT))
        return sorted(filter(is_key, keys))

    def failures(self, kind: str) -> list[Failure]:
        """Failures of `kind` that no later success has removed, not even since the listing."""
        paths = [
            self.path(f"{layout.receipts_folder(kind)}/{name}")
            for name in sorted(self._names(layout.receipts_folder(kind)))
            if name.endswith(layout.FAILURE)
        ]
        return [failure for failure in self.each(self._failure_if_there, paths) if failure is not None]

    def _failure_if_there(self, path: str) -> Failure | None:
        try:
            return failure_from_json(self._read(path), path)
        except FileNotFoundError:
            return None

    @property
    def scratch_folder(self) -> Path:
        """Where work in progress lies, on this machine. Of a remote store beside its cache, which may be deleted."""
        return Path(self.path(layout.scratch_folder())) if self.is_local else self.cache.folder.parent / "scratch"

    # ---- commit --------------------------------------------------------------------------------------------

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty local folder to write an artifact into; it is gone afterwards, committed or not."""
        with self.access():
            parent = self.scratch_folder
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="work-", dir=parent))
        try:
            with writing(f"the store {self.root}" if self.is_local else f"the disk of {folder.parent}"):
                yield folder
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
            versions=dict(_versions()),
            timings={name: round(seconds, 3) for name, seconds in (timings or {}).items()},
            host=os.environ.get(NODE) or socket.gethostname(),
            created=now(),
        )
        target = layout.content_folder(ref.kind, ref.key, digest_of_files(files))
        if self.is_local:
            with self.access():
                move_files(folder, (file.name for file in files), Path(self.path(target)))
        else:
            for file in files:
                with_retries(partial(self._upload, folder / file.name, self.path(f"{target}/{file.name}")))
        self._write(layout.receipt_path(ref.kind, ref.key), receipt.to_json())
        self._remove(layout.failure_path(ref.kind, ref.key))
        if not self.is_local:
            self.cache.adopt(self._copy_of(target), folder, files, keep=ref.kind in POINTED_AT)
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
            host=os.environ.get(NODE) or socket.gethostname(),
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
        else:
            self.cache.drop(self._copy_of(folder))

    # ---- reading -------------------------------------------------------------------------------------------

    def pin(self, receipt: Receipt, *, check: bool = False) -> PinnedFolder:
        """A local folder that holds the artifact's files, for as long as the value lives; `check` hashes every file
        that this process has not hashed yet, or that is not as it was then.

        Of a remote store they are copied into the cache first. DamagedError that names the first file that is gone, has
        another size or, with `check`, other bytes than the receipt says; or, with `check`, that is none of them.
        FatalError: files may not be read, or the cache's disk is full.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        held = PinnedFolder(Path(self.path(folder))) if self.is_local else self._cached(folder, receipt)
        with translate_errors(f"the store {self.root}" if self.is_local else f"the cache {self.cache.folder}"):
            for file in receipt.files:
                path = held.folder / file.name
                if _size(path) != file.size:
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: {path} is gone or has another size than its receipt says; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
                if check and not self._has_its_bytes(path, file, partial(self._cached, folder, receipt)):
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: the bytes of {path} are not those of its receipt; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
        if check and self.is_local and (stray := self.strays(receipt)):
            raise DamagedError(f"{receipt.kind} {receipt.label}: {stray[0]} {STRAY}", stray[0])
        return held

    def strays(self, receipt: Receipt) -> list[str]:
        """Paths in the artifact's folder that its receipt does not name: a library that opens the folder would read
        them. Names with a dot in front are the file system's own."""
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        named = {f"{folder}/{file.name}" for file in receipt.files}
        return [self.path(path) for path in self.find(folder) if path not in named and "/." not in path]

    def local(self, receipt: Receipt) -> Path:
        """`hold` for a moment: sizes are checked, hashes are not. A copy in the cache may be evicted later on."""
        return self.pin(receipt).folder

    def check(self, receipt: Receipt) -> Path:
        """Like `local`, and hashes every file, as `hold` says."""
        return self.pin(receipt, check=True).folder

    def _has_its_bytes(self, path: Path, file: DataFile, again: Callable[[], PinnedFolder]) -> bool:
        if self._hashes.of(path) == file.sha256:
            return True
        if self.is_local:
            return False
        # The copy in the cache may be what is wrong, not the store.
        path.unlink(missing_ok=True)  # another process may have found it as well
        with again():
            return self._hashes.of(path) == file.sha256

    def _cached(self, folder: str, receipt: Receipt) -> PinnedFolder:
        keep = receipt.kind in POINTED_AT
        return self.cache.pin(self._copy_of(folder), receipt.files, partial(self._fetch, folder), keep=keep)

    def _copy_of(self, folder: str) -> str:
        """The folder of the cache where copies of a folder of this store are."""
        return f"{sha256_bytes(self.root.encode())[:8]}/{folder}"

    def remember(self, topic: str, name: str, value: Mapping[str, Any]) -> None:
        """Remembers a small fact; `name` may be any text."""
        self._write(layout.note_path(topic, sha256_bytes(name.encode())), canonical_json(dict(value)))

    def recall(self, topic: str, name: str) -> dict[str, Any] | None:
        """What was remembered under this name, or None."""
        return self.read_json(layout.note_path(topic, sha256_bytes(name.encode())))

    # ---- files of artifacts -----------------------------------------------------------------------------------

    def _read_receipt(self, path: str) -> Receipt:
        data = self.fs.cat_file(path)
        try:
            return receipt_from_json(data, path)
        except DamagedError as error:
            if self.fs.info(path)["size"] == len(data):
                raise
            raise RetryableError(f"{path} came with {len(data):,} bytes only", path) from error

    def _upload(self, path: Path, target: str) -> None:
        with self.access():
            upload(self.fs, path, target)

    def _fetch(self, folder: str, name: str, path: Path) -> None:
        """Copies a file of a remote store to `path`."""
        remote = self.path(f"{folder}/{name}")
        try:
            with_retries(partial(self._download, remote, path))
        except FileNotFoundError as error:
            if error.filename == os.fspath(path):
                raise  # the folder that it goes to was deleted
            raise DamagedError(f"{remote} is gone from the store; run `distil verify`", remote) from error

    def _download(self, remote: str, path: Path) -> None:
        with self.access(), self.cache.filling():
            download_file(self.fs, remote, path)


def _size(path: Path) -> int | None:
    """Bytes of a file, or None where there is none; not `exists`, which may take one that cannot be read for that."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


@cache
def _versions() -> dict[str, str]:
    """Read once a process: the metadata of five packages takes longer to parse than a small artifact to commit."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def reading_ahead(store: Store, ref: Ref | None) -> Iterator[None]:
    """Copies an artifact of a remote store into its cache while the body runs, and waits for it at the end.

    What goes wrong with it is left to whoever needs it: that one tries again, and says so.
    """
    if ref is None or store.is_local:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pool.submit(lambda: store.local(store.receipt(ref)))
        yield


NODE = "DISTIL_NODE"
"""Environment variable: what receipts name as host instead of the host name, where one host has several nodes."""

LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch")

POINTED_AT = ("model",)
"""Kinds of which people are told the folder: of a remote store their copies are never evicted."""

STRAY = "is none of the files that its receipt names; delete it"
"""What is said of a file too many."""
