"""A snapshot: which source files a corpus folder holds now. Made by listing, without reading any source.

    snapshot = take_snapshot(recipe.corpus)
    for source in snapshot.sources: print(source.label, source.size)

Any fsspec URL will do. Checksum files (`fr_sha256.txt`, `SHA256SUMS`) are honoured: their names must be there, and
their hashes identify the sources. Read me's, licences, hidden files and other sums are no sources.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import fsspec

from storage.errors import FatalError
from storage.filesystem import on_this_machine
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.listing import Folder, list_folder, listing_errors, natural, stamp_of
from tasks.recipe.config import CorpusSettings

_CHECKSUMS = re.compile(r"sha256|checksum", re.IGNORECASE)

_SKIPPED_NAMES = re.compile(
    r"[._]|(readme|licen[cs]e|notice|copying|origin)|.*\.md$|(.*[._-])?(md5|sha1|sha512)(sums?)?([._-].*)?$",
    re.IGNORECASE,
)

_SUFFIXES = re.compile(r"(\.(jsonl?|txt|parquet|gz|zst))+$", re.IGNORECASE)

_TEXT_OF_PAIR = re.compile(r"(?P<stem>[A-Za-z-]+)_part_(?P<number>\d+)\.txt(\.gz|\.zst)?")

_METADATA_OF_PAIR = re.compile(r"(?P<stem>[A-Za-z-]+)_meta_part_(?P<number>\d+)\.jsonl(\.gz|\.zst)?")

_LINE = re.compile(r"(?P<hash>[0-9a-fA-F]{64}) [ *]?(?P<name>\S.*)")

_LABEL_LENGTH = 100


@dataclass(frozen=True)
class Source:
    """One source file: its path below the folder, where it is, its size in bytes, and what tells it from another.

    `stamp` is its ETag or time of change; `sha256` comes from a checksum file, None without one. `label` is its name
    for people, made of letters, digits, `.`, `_` and `-`, unique in its snapshot. `companion` is the metadata of a
    21.09 pair.
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
    """The sources of a folder, part 2 before part 10; `absent` are names in checksum files that are not there."""

    url: str
    sources: tuple[Source, ...]
    absent: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over names, sizes and checksums (or stamps)."""
        files = [one for source in self.sources for one in (source, source.companion) if one]
        return sha256_bytes(canonical_json([[one.name, one.size, one.sha256 or one.stamp] for one in files]))


def take_snapshot(corpus: CorpusSettings, *, partial: bool = False) -> Snapshot:
    """Lists the sources of `corpus.url`, subfolders included, whose file name fits `corpus.pattern`.

    FatalError: no such folder, no source in it, a link that leads out of it, a bad checksum file, and, unless
    `partial`, a name in a checksum file that is not there.
    """
    return snapshot_of(list_folder(corpus.url), corpus, partial=partial)


def snapshot_of(folder: Folder, corpus: CorpusSettings, *, partial: bool = False) -> Snapshot:
    """`take_snapshot` of a listing that is there already; its errors are the same.

    With `partial` a folder that holds a checksum file and nothing of what it names is a snapshot without sources.
    """
    fs, files = folder.fs, folder.files
    with listing_errors(corpus.url):
        checksums = _checksums(fs, folder.root, files)
    absent = tuple(sorted(name for name in checksums.keys() - files.keys() if _matches_pattern(name, corpus.pattern)))
    if absent and not partial:
        more = f" (nor are {len(absent) - 1} others)" if absent[1:] else ""
        raise FatalError(
            f"{corpus.url}: {absent[0]} is named in a checksum file but is not there{more}; "
            "fetch it, or wait until the folder is whole",
            absent[0],
        )
    everything = {name: _source(fs, name, detail, checksums.get(name)) for name, detail in files.items()}
    sources = _paired([source for name, source in everything.items() if _is_source(name)])
    sources = [source for source in sources if _matches_pattern(source.name, corpus.pattern)]
    if not sources and not (partial and absent):
        raise FatalError(
            f"{corpus.url} holds no source file{'' if corpus.pattern == '*' else f' that fits {corpus.pattern}'}; "
            "correct corpus.url or corpus.pattern",
            corpus.url,
        )
    return Snapshot(corpus.url, tuple(_labelled(sorted(sources, key=lambda source: natural(source.name)))), absent)


def parse_checksums(text: str, file: str) -> dict[str, str]:
    """Name -> hex sha256 of lines `hash name`, as OSCAR writes them (one space) and sha256sum (two, or one and `*`).

    FatalError with the line: not such a line, a name that leads out of the folder or has odd characters, two hashes of
    one name.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise FatalError(f"{file}, line {number}: not `sha256 name` but {line[:80]!r}", file, number)
        name, digest = match["name"].removeprefix("./"), match["hash"].lower()
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise FatalError(
                f"{file}, line {number}: the name {name[:80]!r} leads out of the folder or has odd characters; "
                "correct it",
                file,
                number,
            )
        if found.setdefault(name, digest) != digest:
            raise FatalError(f"{file}, line {number}: a second, different hash of {name}", file, number)
    return found


def source_content(store: Store, source: Source) -> str | None:
    """Hex sha256 of a source: from its checksum file, or remembered from when it was read; None if not known."""
    if source.sha256:
        return source.sha256
    if not source.size:
        return sha256_bytes(b"")  # so that the failure of an empty source has a key to be noted under
    noted = store.recall("source", _identity(source))
    return noted["sha256"] if noted else None


def remember_source_content(store: Store, source: Source, content: str) -> None:
    """Remembers the hash of a source, for as long as its URL, size and stamp stay the same."""
    store.remember("source", _identity(source), {"url": source.url, "sha256": content})


def _identity(source: Source) -> str:
    return f"{source.url}|{source.size}|{source.stamp}"


# ---- what is a source --------------------------------------------------------------------------------------


def _checksums(fs: fsspec.AbstractFileSystem, root: str, files: Iterable[str]) -> dict[str, str]:
    """Path below the folder -> hex sha256, from every checksum file; its names are relative to its own folder."""
    found: dict[str, str] = {}
    for path in files:
        if not _is_checksum_file(path):
            continue
        try:
            text = fs.cat_file(f"{root.rstrip('/')}/{path}").decode()
        except UnicodeDecodeError as error:
            raise FatalError(f"{path}: a checksum file that is not UTF-8; mend or remove it", path) from error
        for name, digest in parse_checksums(text, path).items():
            whole = (PurePosixPath(path).parent / name).as_posix()
            if found.setdefault(whole, digest) != digest:
                raise FatalError(f"{path}: {name} has another hash in another checksum file; remove one", path)
    return found


def _source(fs: fsspec.AbstractFileSystem, name: str, detail: Mapping[str, Any], sha256: str | None) -> Source:
    path = detail.get("name", name)
    url = path if on_this_machine(fs) else fs.unstrip_protocol(path)
    return Source(name, url, int(detail["size"]), stamp_of(detail), sha256, _plain(name))


def _is_checksum_file(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return bool(_CHECKSUMS.search(name)) and not re.search(r"\.(jsonl?|parquet|gz|zst)$", name)


def _is_source(path: str) -> bool:
    parts = path.split("/")
    hidden = any(part.startswith((".", "_")) for part in parts[:-1])
    return not hidden and not _SKIPPED_NAMES.match(parts[-1]) and not _is_checksum_file(path)


def _matches_pattern(path: str, pattern: str) -> bool:
    return fnmatchcase(path.rsplit("/", 1)[-1], pattern)


# ---- pairs and names ---------------------------------------------------------------------------------------


def _paired(sources: Iterable[Source]) -> list[Source]:
    """Puts the metadata file of each 21.09 pair (fr_part_3.txt.gz + fr_meta_part_3.jsonl.gz) with its text."""
    sources = list(sources)
    metadata = {}
    for source in sources:
        folder, _, name = source.name.rpartition("/")
        if match := _METADATA_OF_PAIR.fullmatch(name):
            metadata[folder, match["stem"], match["number"]] = source
    paired, taken = [], set()
    for source in sources:
        folder, _, name = source.name.rpartition("/")
        match = _TEXT_OF_PAIR.fullmatch(name)
        companion = metadata.get((folder, match["stem"], match["number"])) if match else None
        if companion:
            taken.add(companion.name)
        paired.append(replace(source, companion=companion))
    return [source for source in paired if source.name not in taken]


def _labelled(sources: list[Source]) -> list[Source]:
    """Gives each source a label of its own: its file name, where need be with folders, or with a hash of its path."""
    names = [source.name for source in sources]
    labels = [_plain(name.rsplit("/", 1)[-1]) for name in names]
    for longer in (_plain, lambda name: f"{_plain(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"):
        seen = Counter(label.lower() for label in labels)
        labels = [
            label if seen[label.lower()] == 1 else longer(name) for name, label in zip(names, labels, strict=True)
        ]
    return [replace(source, label=label) for source, label in zip(sources, labels, strict=True)]


def _plain(name: str) -> str:
    """A name without its suffixes, of letters, digits, `.`, `_` and `-` only."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", _SUFFIXES.sub("", name.replace("/", "-"))).lstrip(".-_")
    return plain[-_LABEL_LENGTH:].lstrip(".-_") or "source"
