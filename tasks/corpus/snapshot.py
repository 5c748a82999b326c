"""Takes a snapshot of a corpus folder: lists its current source files without reading them.

    snapshot = take_snapshot(recipe.corpus)
    for source in snapshot.sources: print(source.label, source.size)

The folder may be any fsspec URL. Each file that a checksum file (`fr_sha256.txt`, `SHA256SUMS`) lists must exist, and
its hash identifies the source. Readme files, licences, hidden files and checksum files of other types are not sources.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import fsspec

from storage.errors import FatalError
from storage.files.filesystem import on_this_machine
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.checksums import is_checksum_file, read_checksums
from tasks.corpus.listing import FolderListing, list_folder, listing_errors, natural_key, stamp_of
from tasks.recipe.config import CorpusSettings

_SKIPPED_NAMES = re.compile(
    r"[._]|(readme|licen[cs]e|notice|copying|origin)|.*\.md$|(.*[._-])?(md5|sha1|sha512)(sums?)?([._-].*)?$",
    re.IGNORECASE,
)

_SUFFIXES = re.compile(r"(\.(jsonl?|txt|parquet|gz|zst))+$", re.IGNORECASE)

_TEXT_OF_PAIR = re.compile(r"(?P<stem>[A-Za-z-]+)_part_(?P<number>\d+)\.txt(\.gz|\.zst)?")

_METADATA_OF_PAIR = re.compile(r"(?P<stem>[A-Za-z-]+)_meta_part_(?P<number>\d+)\.jsonl(\.gz|\.zst)?")

_LABEL_LENGTH = 100


@dataclass(frozen=True)
class Source:
    """One source file. `name` is its path below the folder, `url` its location, `size` its size in bytes.

    `stamp` is the ETag or modification time. `sha256` is the hash in a checksum file, or None. `label` is the display
    name: it is unique in the snapshot and consists of letters, digits, `.`, `_` and `-`. `companion` is the metadata
    file if the source is the text file of an OSCAR 21.09 pair.
    """

    name: str
    url: str
    size: int
    stamp: str
    sha256: str | None
    label: str
    companion: "Source | None" = None

    @property
    def is_local(self) -> bool:
        """True if `url` is a path on this machine."""
        return "://" not in self.url


@dataclass(frozen=True)
class Snapshot:
    """The sources of a folder in natural order. `absent` contains the listed names without a file."""

    url: str
    sources: tuple[Source, ...]
    absent: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the names, sizes and checksums of the sources (or stamps, where there is no checksum)."""
        files = [file for source in self.sources for file in (source, source.companion) if file]
        return sha256_bytes(canonical_json([[file.name, file.size, file.sha256 or file.stamp] for file in files]))


def take_snapshot(corpus: CorpusSettings, *, partial: bool = False) -> Snapshot:
    """Lists the sources in `corpus.url` and its subfolders whose file name matches `corpus.pattern`.

    Raises FatalError if the folder does not exist or contains no source, if a link points outside it, if a checksum
    file is invalid, or, unless `partial` is set, if a file that a checksum file lists does not exist.
    """
    return snapshot_of(list_folder(corpus.url), corpus, partial=partial)


def snapshot_of(folder: FolderListing, corpus: CorpusSettings, *, partial: bool = False) -> Snapshot:
    """Takes a snapshot from an existing listing. Raises the same errors as `take_snapshot`.

    If `partial` is set, a folder with a checksum file but none of the listed files is a snapshot without sources.
    """
    fs, files = folder.fs, folder.files
    with listing_errors(corpus.url):
        checksums = read_checksums(fs, folder.root, files)
    absent = tuple(sorted(name for name in checksums.keys() - files.keys() if _matches_pattern(name, corpus.pattern)))
    if absent and not partial:
        more = f" (nor do {len(absent) - 1} others)" if absent[1:] else ""
        raise FatalError(
            f"{corpus.url}: {absent[0]} is listed in a checksum file but does not exist{more}; "
            "download it, or wait until the folder is complete",
            absent[0],
        )
    listed = [_source(fs, name, detail, checksums.get(name)) for name, detail in files.items() if _is_source(name)]
    sources = _with_companions(listed)
    sources = [source for source in sources if _matches_pattern(source.name, corpus.pattern)]
    if not sources and not (partial and absent):
        matching = "" if corpus.pattern == "*" else f" that matches {corpus.pattern}"
        raise FatalError(
            f"{corpus.url} contains no source file{matching}; correct corpus.url or corpus.pattern",
            corpus.url,
        )
    sources.sort(key=lambda source: natural_key(source.name))
    return Snapshot(corpus.url, tuple(_with_unique_labels(sources)), absent)


def source_content(store: Store, source: Source) -> str | None:
    """Returns the hex sha256 of a source from a checksum file or an earlier read, or None if it is unknown."""
    if source.sha256:
        return source.sha256
    if not source.size:
        return sha256_bytes(b"")  # so that the failure of an empty source has a key
    remembered = store.recall("source", _identity(source))
    return remembered["sha256"] if remembered else None


def remember_source_content(store: Store, source: Source, content: str) -> None:
    """Stores the hex sha256 of a source; it is valid as long as URL, size and stamp of the source are unchanged."""
    store.remember("source", _identity(source), {"url": source.url, "sha256": content})


def _identity(source: Source) -> str:
    return f"{source.url}|{source.size}|{source.stamp}"


# ---- source files and checksum files -----------------------------------------------------------------------


def _source(fs: fsspec.AbstractFileSystem, name: str, detail: Mapping[str, Any], sha256: str | None) -> Source:
    path = detail.get("name", name)
    url = path if on_this_machine(fs) else fs.unstrip_protocol(path)
    return Source(name, url, int(detail["size"]), stamp_of(detail), sha256, _safe_label(name))


def _is_source(path: str) -> bool:
    parts = path.split("/")
    hidden = any(part.startswith((".", "_")) for part in parts[:-1])
    return not hidden and not _SKIPPED_NAMES.match(parts[-1]) and not is_checksum_file(path)


def _matches_pattern(path: str, pattern: str) -> bool:
    return fnmatchcase(path.rsplit("/", 1)[-1], pattern)


# ---- pairs and labels --------------------------------------------------------------------------------------


def _with_companions(sources: Iterable[Source]) -> list[Source]:
    """Attaches the metadata file of each 21.09 pair (fr_meta_part_3.jsonl.gz) to its text file (fr_part_3.txt.gz)."""
    sources = list(sources)
    metadata = {}
    for source in sources:
        folder, _, name = source.name.rpartition("/")
        if match := _METADATA_OF_PAIR.fullmatch(name):
            metadata[folder, match["stem"], match["number"]] = source
    paired, companions = [], set()
    for source in sources:
        folder, _, name = source.name.rpartition("/")
        match = _TEXT_OF_PAIR.fullmatch(name)
        companion = metadata.get((folder, match["stem"], match["number"])) if match else None
        if companion:
            companions.add(companion.name)
        paired.append(replace(source, companion=companion))
    return [source for source in paired if source.name not in companions]


def _with_unique_labels(sources: list[Source]) -> list[Source]:
    """Sets a unique label for each source: its file name, or its path, with a hash of the path if necessary."""
    names = [source.name for source in sources]
    labels = [_safe_label(name.rsplit("/", 1)[-1]) for name in names]
    for longer in (_safe_label, lambda name: f"{_safe_label(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"):
        uses = Counter(label.lower() for label in labels)
        labels = [
            label if uses[label.lower()] == 1 else longer(name) for name, label in zip(names, labels, strict=True)
        ]
    return [replace(source, label=label) for source, label in zip(sources, labels, strict=True)]


def _safe_label(name: str) -> str:
    """Returns a path without its suffixes, with `_` for all characters except letters, digits, `.`, `_` and `-`."""
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", _SUFFIXES.sub("", name.replace("/", "-"))).lstrip(".-_")
    return label[-_LABEL_LENGTH:].lstrip(".-_") or "source"
