"""The store: artifacts under any fsspec URL, each as data written first and a receipt written last.

    store = Store("/data/distil/store")            # or s3://bucket/prefix, memory://name
    with store.scratch() as folder:
        ...write files into folder...
        receipt = store.commit(ref, folder, schema=1, rows=…, tokens=…, settings=…, parents=…)
    with store.pin(receipt, check=True) as folder:
        ...read files of folder...

Terms:
- artifact: the files that one job makes, such as the token blocks of one shard; immutable once committed.
- kind and key: its identity. The kind is the type (storage.artifact.KINDS); the key is a hash of the settings and the
  parents that it is made from (storage.fingerprint.key_of), so equal inputs always have equal keys.
- receipt: the JSON that lists its files with sizes and hashes. No receipt means that the artifact does not exist.
- failure: the JSON that says why a job failed; a later commit of the same key deletes it.
- cache: the local copies of a remote store's files (storage.cache). A pinned artifact is never evicted from it.
- lease: the claim of one process on a training run (storage.lease).

Failures that the design covers:
- A crash before the receipt leaves data without a receipt. It does not count, and `gc` deletes it.
- Two writers of one key: the data of each has a folder named by its content; the last receipt wins, and its files are
  complete. Object stores need no rename and no conditional write for this.
- A short upload: the size of each object is requested after the upload, before the receipt is written.
- Damaged data: readers verify hashes before they use an artifact (`check`, or `pin` with `check=True`). A process
  hashes an unchanged file once, so a second check costs nothing.

Local files are written atomically and flushed (storage.files.disk); transfers are retried (storage.files.filesystem).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from storage import layout
from storage.artifact import DataFile, Failure, Receipt, Ref, digest_of_files, host_name, now
from storage.cache import DEFAULT_CACHE_BYTES, Cache, PinnedFolder
from storage.errors import DamagedError
from storage.files.disk import move_files, writing
from storage.files.filesystem import download_file, translate_errors, upload, with_retries
from storage.fingerprint import HashCache, canonical_json, sha256_bytes, sha256_file
from storage.receipts import Receipts

LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch")
"""Packages whose versions a receipt records."""

PERMANENT = ("model",)
"""Kinds whose local folder is shown to users: the cache never evicts their copies."""

STRAY = "is none of the files that its receipt names; delete it"
"""End of the error message about a stray file."""


class Store(Receipts):
    """Artifacts under one root. `cache` is the folder for copies of a remote root's files, of `cache_bytes` at most.

    FatalError: the root cannot be opened, because its package is not installed or the URL holds a password.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        cache: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(root, options)
        self.cache = Cache(cache or Path(tempfile.gettempdir()) / f"distil-{os.getuid()}" / "cache", cache_bytes)
        self._hashes = HashCache()

    # ---- writing -------------------------------------------------------------------------------------------

    @property
    def scratch_folder(self) -> Path:
        """Local folder of work in progress: inside a local store, or next to the cache of a remote store."""
        return Path(self.path(layout.scratch_folder())) if self.is_local else self.cache.folder.parent / "scratch"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty local folder to write an artifact into; deleted at the end, committed or not.

        FatalError if its disk is full or read-only.
        """
        with self.translate_errors():
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
        """Moves every file of `folder`, with its subfolders, into the store, then writes the receipt.

        `rows` and `tokens` count the content, `settings` and `parents` are those of the key, `info` holds results of
        the computation, `timings` are seconds. FatalError, RetryableError: the store cannot be written.
        """
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
            host=host_name(),
            created=now(),
        )
        target = layout.content_folder(ref.kind, ref.key, digest_of_files(files))
        if self.is_local:
            with self.translate_errors():
                move_files(folder, (file.name for file in files), Path(self.path(target)))
        else:
            for file in files:
                with_retries(partial(self._upload, folder / file.name, self.path(f"{target}/{file.name}")))
        self._write(layout.receipt_path(ref.kind, ref.key), receipt.to_json())
        self._remove(layout.failure_path(ref.kind, ref.key))
        if not self.is_local:
            self.cache.adopt(self._copy_of(target), folder, files, permanent=ref.kind in PERMANENT)
        return receipt

    def fail(self, ref: Ref, error: Exception) -> Failure:
        """Records why `ref` could not be made."""
        failure = Failure.from_error(ref.kind, ref.key, ref.label, error)
        self._write(layout.failure_path(ref.kind, ref.key), canonical_json(asdict(failure)))
        return failure

    def withdraw(self, ref: Ref) -> None:
        """Deletes the receipt: the artifact no longer exists. Its data is left to `gc`."""
        self._remove(layout.receipt_path(ref.kind, ref.key))

    def drop_data(self, receipt: Receipt) -> None:
        """Deletes the data of an artifact whose receipt was withdrawn, and its copy in the cache."""
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        for file in receipt.files:
            self._remove(f"{folder}/{file.name}")
        if self.is_local:
            shutil.rmtree(self.path(layout.key_folder(receipt.kind, receipt.key)), ignore_errors=True)
        else:
            self.cache.drop(self._copy_of(folder))

    # ---- reading -------------------------------------------------------------------------------------------

    def pin(self, receipt: Receipt, *, check: bool = False) -> PinnedFolder:
        """A local folder with the artifact's files, which stays until the returned object is released.

        Files of a remote store are copied into the cache first. Sizes are always compared with the receipt, and hashes
        with `check` (of files that this process has not hashed, or that changed since). DamagedError: a file is
        missing, differs, or (with `check`) is not named by the receipt. FatalError: a file is not readable, or the
        cache's disk is full.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        pinned = PinnedFolder(Path(self.path(folder))) if self.is_local else self._pin_copy(folder, receipt)
        with translate_errors(f"the store {self.root}" if self.is_local else f"the cache {self.cache.folder}"):
            for file in receipt.files:
                path = pinned.folder / file.name
                if _size(path) != file.size:
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: {path} is gone or has another size than its receipt says; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
                if check and not self._matches(path, file, partial(self._pin_copy, folder, receipt)):
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: the bytes of {path} are not those of its receipt; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
        if check and self.is_local and (stray := self.strays(receipt)):
            raise DamagedError(f"{receipt.kind} {receipt.label}: {stray[0]} {STRAY}", stray[0])
        return pinned

    def strays(self, receipt: Receipt) -> list[str]:
        """Paths in the artifact's folder that its receipt does not name; a library that opens it would read them.

        Names that begin with a dot are ignored: file systems create them.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        named = {f"{folder}/{file.name}" for file in receipt.files}
        return [self.path(path) for path in self.find(folder) if path not in named and "/." not in path]

    def local(self, receipt: Receipt) -> Path:
        """The artifact's local folder, with sizes verified; a copy in the cache may be evicted at any later time."""
        return self.pin(receipt).folder

    def check(self, receipt: Receipt) -> Path:
        """The artifact's local folder, with hashes verified; a copy in the cache may be evicted as with `local`."""
        return self.pin(receipt, check=True).folder

    def _matches(self, path: Path, file: DataFile, copy_again: Callable[[], PinnedFolder]) -> bool:
        """True if the file has the receipt's hash; a copy with another hash is replaced once."""
        if self._hashes.sha256(path) == file.sha256:
            return True
        if self.is_local:
            return False
        path.unlink(missing_ok=True)  # another process may have deleted it too
        with copy_again():
            return self._hashes.sha256(path) == file.sha256

    def _pin_copy(self, folder: str, receipt: Receipt) -> PinnedFolder:
        fetch = partial(self._fetch, folder)
        return self.cache.pin(self._copy_of(folder), receipt.files, fetch, permanent=receipt.kind in PERMANENT)

    def _copy_of(self, folder: str) -> str:
        """The cache's name for a folder of this store; one cache serves several stores."""
        return f"{sha256_bytes(self.root.encode())[:8]}/{folder}"

    # ---- notes ---------------------------------------------------------------------------------------------

    def remember(self, topic: str, name: str, value: Mapping[str, Any]) -> None:
        """Stores a small JSON object under `topic` and `name`, which may be any text."""
        self._write(layout.note_path(topic, sha256_bytes(name.encode())), canonical_json(dict(value)))

    def recall(self, topic: str, name: str) -> dict[str, Any] | None:
        """The object that `remember` stored, or None."""
        return self.read_json(layout.note_path(topic, sha256_bytes(name.encode())))

    # ---- transfers -------------------------------------------------------------------------------------------

    def _upload(self, path: Path, target: str) -> None:
        with self.translate_errors():
            upload(self.fs, path, target)

    def _fetch(self, folder: str, name: str, path: Path) -> None:
        """Copies one file of a remote folder to `path`."""
        remote = self.path(f"{folder}/{name}")
        try:
            with_retries(partial(self._download, remote, path))
        except FileNotFoundError as error:
            if error.filename == os.fspath(path):
                raise  # the cache folder was deleted
            raise DamagedError(f"{remote} is gone from the store; run `distil verify`", remote) from error

    def _download(self, remote: str, path: Path) -> None:
        with self.translate_errors(), self.cache.disk_errors():
            download_file(self.fs, remote, path)


def _size(path: Path) -> int | None:
    """Bytes of a file, or None if it does not exist; unlike `exists`, raises if the file cannot be read."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


@cache
def _versions() -> dict[str, str]:
    """Versions of LIBRARIES; cached, because parsing their metadata takes longer than committing a small artifact."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def reading_ahead(store: Store, ref: Ref | None) -> Iterator[None]:
    """Copies an artifact of a remote store into the cache while the body runs, and waits for the copy at the end.

    Errors are dropped: the later reader of the artifact copies it again, and raises them.
    """
    if ref is None or store.is_local:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        pool.submit(lambda: store.local(store.receipt(ref)))
        yield
