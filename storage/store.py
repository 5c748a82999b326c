"""Stores artifacts under any fsspec URL. The data of an artifact is written first, its receipt last.

    store = Store("/data/distil/store")            # or s3://bucket/prefix, memory://name
    with store.scratch() as folder:
        ...  # write files into folder
        receipt = store.commit(ref, folder, schema=1, rows=…, tokens=…, settings=…, parents=…)
    with store.pin(receipt, check=True) as folder:
        ...  # read files in folder

Terms:
- artifact: the files that one job produces, such as the token blocks of one shard; immutable once committed.
- kind and key: the identity of an artifact. The kind is its type (storage.artifact.KINDS); the key is a hash of its
  settings and parents (storage.fingerprint.key_of), so equal inputs always have equal keys.
- receipt: the JSON file that lists the files of an artifact with sizes and hashes; an artifact exists only with it.
- failure: the JSON file that records why a job failed; a later commit of the same key deletes it.
- cache: the local copies of a remote store's files (storage.cache). Pinned artifacts are never evicted.
- lease: the claim of one process on a training run (storage.lease).

The design covers these failures:
- A crash before the receipt is written leaves data without a receipt. Such data is ignored, and `gc` deletes it.
- Two processes may write the same key. Each writes into a folder named by a hash of its content; the last receipt wins,
  and its files are complete. This requires neither renames nor conditional writes from an object store.
- An upload may be truncated. The size of each object is checked after the upload, before the receipt is written.
- Data may be damaged. Readers verify hashes before they use an artifact (`verified_folder`, `pin` with `check=True`).
  Each process hashes an unchanged file only once, so a second check costs nothing.

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
"""Packages whose versions are recorded in receipts."""

PERMANENT = ("model",)
"""Kinds whose local folders are shown to users, so the cache never evicts them."""

STRAY = "is not listed in the receipt; delete this file"
"""End of the error message about a stray file."""


class Store(Receipts):
    """The artifacts under one root. `cache` is the folder for copies of remote files, limited to `cache_bytes` bytes.

    Raises FatalError if the package of the protocol is not installed or the URL contains a password.
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
        """Local folder of work in progress, inside a local store or next to the cache of a remote store."""
        return Path(self.path(layout.scratch_folder())) if self.is_local else self.cache.folder.parent / "scratch"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Creates an empty local folder for the files of an artifact, and deletes it at the end in any case.

        Raises FatalError if the disk is full or read-only.
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
        """Moves all files in `folder` and its subfolders into the store, then writes the receipt, and returns it.

        `rows` and `tokens` are the size of the content, `settings` and `parents` are those of the key, `info` contains
        results of the computation, and `timings` are in seconds.

        Raises FatalError or RetryableError if the store is not writable.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise ValueError(f"the folder to commit for {ref.kind} {ref.label} contains no files")
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
        """Records in the store why `ref` could not be made, and returns the failure."""
        failure = Failure.from_error(ref.kind, ref.key, ref.label, error)
        self._write(layout.failure_path(ref.kind, ref.key), canonical_json(asdict(failure)))
        return failure

    def withdraw(self, ref: Ref) -> None:
        """Deletes the receipt, so that the artifact no longer exists. Its data remains until `gc` deletes it."""
        self._remove(layout.receipt_path(ref.kind, ref.key))

    def drop_data(self, receipt: Receipt) -> None:
        """Deletes the data of a withdrawn artifact and its copy in the cache."""
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        for file in receipt.files:
            self._remove(f"{folder}/{file.name}")
        if self.is_local:
            shutil.rmtree(self.path(layout.key_folder(receipt.kind, receipt.key)), ignore_errors=True)
        else:
            self.cache.drop(self._copy_of(folder))

    # ---- reading -------------------------------------------------------------------------------------------

    def pin(self, receipt: Receipt, *, check: bool = False) -> PinnedFolder:
        """Returns a local folder with the artifact's files, which is not evicted until the returned object is released.

        Files of a remote store are copied into the cache first. Sizes are always compared with the receipt. If `check`
        is set, hashes are compared too, unless this process has already hashed the unchanged file.

        Raises DamagedError if a file is missing, differs from the receipt, or (with `check`) is not listed in it.
        Raises FatalError if a file is unreadable or the disk of the cache is full.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        pinned = PinnedFolder(Path(self.path(folder))) if self.is_local else self._pin_copy(folder, receipt)
        with translate_errors(f"the store {self.root}" if self.is_local else f"the cache {self.cache.folder}"):
            for file in receipt.files:
                path = pinned.folder / file.name
                if _size(path) != file.size:
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: {path} is missing or its size differs from the receipt; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
                if check and not self._matches(path, file, partial(self._pin_copy, folder, receipt)):
                    raise DamagedError(
                        f"{receipt.kind} {receipt.label}: the sha256 of {path} differs from the receipt; "
                        "run `distil verify`",
                        os.fspath(path),
                    )
        if check and self.is_local and (stray := self.strays(receipt)):
            raise DamagedError(f"{receipt.kind} {receipt.label}: {stray[0]} {STRAY}", stray[0])
        return pinned

    def strays(self, receipt: Receipt) -> list[str]:
        """Returns the paths in the artifact's folder that its receipt does not list, which libraries might read.

        Names that begin with a dot are ignored, because file systems create such files.
        """
        folder = layout.content_folder(receipt.kind, receipt.key, receipt.content)
        named = {f"{folder}/{file.name}" for file in receipt.files}
        return [self.path(path) for path in self.find(folder) if path not in named and "/." not in path]

    def local_folder(self, receipt: Receipt) -> Path:
        """Returns the artifact's local folder after checking sizes. A copy in the cache may be evicted at any time."""
        return self.pin(receipt).folder

    def verified_folder(self, receipt: Receipt) -> Path:
        """Returns the artifact's local folder after checking hashes. A copy in the cache may be evicted at any time."""
        return self.pin(receipt, check=True).folder

    def _matches(self, path: Path, file: DataFile, copy_again: Callable[[], PinnedFolder]) -> bool:
        """Returns True if the hash of the file is that of the receipt. A copy with a wrong hash is replaced once."""
        if self._hashes.sha256(path) == file.sha256:
            return True
        if self.is_local:
            return False
        path.unlink(missing_ok=True)  # another process may have deleted the file too
        with copy_again():
            return self._hashes.sha256(path) == file.sha256

    def _pin_copy(self, folder: str, receipt: Receipt) -> PinnedFolder:
        fetch = partial(self._fetch, folder)
        return self.cache.pin(self._copy_of(folder), receipt.files, fetch, permanent=receipt.kind in PERMANENT)

    def _copy_of(self, folder: str) -> str:
        """Returns the name of a folder in the cache, which several stores may share."""
        return f"{sha256_bytes(self.root.encode())[:8]}/{folder}"

    # ---- notes ---------------------------------------------------------------------------------------------

    def remember(self, topic: str, name: str, value: Mapping[str, Any]) -> None:
        """Stores a small JSON object under `topic` and `name`. The name may be any text."""
        self._write(layout.note_path(topic, sha256_bytes(name.encode())), canonical_json(dict(value)))

    def recall(self, topic: str, name: str) -> dict[str, Any] | None:
        """Returns the object that `remember` stored, or None."""
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
                raise  # the cache folder was deleted; the caller tries again
            raise DamagedError(f"{remote} is missing from the store; run `distil verify`", remote) from error

    def _download(self, remote: str, path: Path) -> None:
        with self.translate_errors(), self.cache.disk_errors():
            download_file(self.fs, remote, path)


def _size(path: Path) -> int | None:
    """Returns the bytes of a file, or None if it does not exist. Unlike `exists`, it raises if access is denied."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


@cache
def _versions() -> dict[str, str]:
    """Returns the versions of LIBRARIES. They are cached, because reading them takes longer than a small commit."""
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

    Errors are ignored here; the later reader of the artifact repeats the copy and raises them.
    """
    if ref is None or store.is_local:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        pool.submit(lambda: store.local_folder(store.receipt(ref)))
        yield
