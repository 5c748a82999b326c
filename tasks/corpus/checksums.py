"""Reads the checksum files of a corpus in the formats of OSCAR and sha256sum.

hashes = read_checksums(fs, root, files)        # hex sha256 by path below the folder
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

import fsspec

from storage.errors import FatalError

_CHECKSUM_FILE = re.compile(r"sha256|checksum", re.IGNORECASE)

_CHECKSUM_LINE = re.compile(r"(?P<hash>[0-9a-fA-F]{64}) [ *]?(?P<name>\S.*)")


def read_checksums(fs: fsspec.AbstractFileSystem, root: str, files: Iterable[str]) -> dict[str, str]:
    """Returns the hex sha256 by path below `root`, from all checksum files.

    The names in a checksum file are relative to the folder of that file. Raises FatalError if a checksum file is not
    valid or two of them contradict each other.
    """
    found: dict[str, str] = {}
    for path in files:
        if not is_checksum_file(path):
            continue
        try:
            text = fs.cat_file(f"{root.rstrip('/')}/{path}").decode()
        except UnicodeDecodeError as error:
            raise FatalError(f"{path}: this checksum file is not UTF-8; fix or remove it", path) from error
        for name, digest in parse_checksums(text, path).items():
            full_name = (PurePosixPath(path).parent / name).as_posix()
            if found.setdefault(full_name, digest) != digest:
                raise FatalError(
                    f"{path}: the hash of {name} differs from that in another checksum file; remove one of them", path
                )
    return found


def parse_checksums(text: str, file: str) -> dict[str, str]:
    """Returns the hex sha256 by name, from lines `hash name` of OSCAR (one space) or sha256sum (two, or one and `*`).

    Raises FatalError, with the line number, if a line has a different format, a name points outside the folder or
    contains unprintable characters, or a name has two hashes.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise FatalError(
                f"{file}, line {number}: expected `sha256 name`, found {line[:80]!r}; correct or remove it",
                file,
                number,
            )
        name, digest = match["name"].removeprefix("./"), match["hash"].lower()
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise FatalError(
                f"{file}, line {number}: the name {name[:80]!r} points outside the folder or contains unprintable "
                "characters; correct it",
                file,
                number,
            )
        if found.setdefault(name, digest) != digest:
            raise FatalError(
                f"{file}, line {number}: a second, different hash of {name}; remove one of them", file, number
            )
    return found


def is_checksum_file(path: str) -> bool:
    """Returns True if `path` is a checksum file, by its name."""
    name = path.rsplit("/", 1)[-1]
    return bool(_CHECKSUM_FILE.search(name)) and not re.search(r"\.(jsonl?|parquet|gz|zst)$", name)
