"""Injects faults, one at a time, into copies of a store for test_corruption.py.

    for fault in injected_faults(store, receipt, others):      # others: valid receipts of the same kind
        copy = restored_copy(store, folder)
        fault.inject(copy)

Copies consist of hard links, so files are replaced, never written to. A fault changes files, or changes a receipt so
that its seal does not match; `reseal` makes a wrong receipt with a matching seal, as a faulty program could.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from storage import layout
from storage.arrow import TARGETS_FILE, TARGETS_SCHEMA, ArrowWriter
from storage.artifact import Receipt, Ref
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.targets.targets_file import TargetRows, file_metadata, write_rows

Change = Callable[[bytes], bytes | None]
"""Maps the bytes of a file to its new bytes; None deletes the file."""
Body = dict[str, Any]


@dataclass(frozen=True)
class InjectedFault:
    """One fault; `inject` injects it into a copy of the store."""

    name: str
    inject: Callable[[Store], object]


def linked_copy(store: Store, folder: Path) -> Store:
    """Makes a copy of the store, without its scratch folder, as hard links in `folder`, which must not exist."""
    shutil.copytree(store.root, folder, copy_function=os.link, ignore=shutil.ignore_patterns("scratch"))
    return Store(folder)


def restored_copy(store: Store, folder: Path) -> Store:
    """Makes a linked copy in `folder`, or restores an existing one: deleting thousands of copies takes minutes."""
    if not folder.exists():
        return linked_copy(store, folder)
    ours, theirs = _inodes(folder), _inodes(Path(store.root))
    for name in ours.keys() - theirs.keys():
        (folder / name).unlink()
    for name, inode in theirs.items():
        if ours.get(name) != inode:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(Path(store.root) / name, path)
    return Store(folder)


def _inodes(root: Path) -> dict[Path, int]:
    """Returns the inode of each file and symbolic link below `root`, except in the scratch folder."""
    paths = (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    return {name: path.lstat().st_ino for path in paths if (name := path.relative_to(root)).parts[0] != "scratch"}


def injected_faults(store: Store, receipt: Receipt, others: Sequence[Receipt]) -> list[InjectedFault]:
    """Returns all faults that can be injected into one artifact."""
    return [*_of_files(store, receipt), *_of_wholes(receipt, others), *_of_receipts(store, receipt, others)]


def data_path(store: Store, receipt: Receipt, name: str) -> Path:
    return Path(store.path(f"{layout.content_folder(receipt.kind, receipt.key, receipt.content)}/{name}"))


def receipt_path_in(store: Store, receipt: Receipt) -> Path:
    return Path(store.path(layout.receipt_path(receipt.kind, receipt.key)))


def put(path: Path, data: bytes | None) -> None:
    """Replaces or deletes a file; other hard links to it keep its bytes."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


# ---- files -------------------------------------------------------------------------------------------------


def flip(place: float) -> Change:
    """Returns a change that flips one bit of the byte at a fraction `place` of the file."""

    def change(data: bytes) -> bytes:
        at = min(int(len(data) * place), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else data

    return change


def footer(data: bytes) -> bytes:
    """Flips one bit 40 bytes before the end of a file: in an Arrow file, a bit of the footer."""
    at = max(0, len(data) - 40)
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :] if data else data


FILES: Mapping[str, Change] = {
    "first byte flipped": flip(0.0),
    "byte in the first tenth flipped": flip(0.1),
    "byte in the middle flipped": flip(0.5),
    "byte in the third quarter flipped": flip(0.75),
    "byte in the footer flipped": footer,
    "last byte flipped": flip(1.0),
    "last byte cut off": lambda data: data[:-1],
    "second half cut off": lambda data: data[: len(data) // 2],
    "second half zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "emptied": lambda data: b"",
    "byte appended": lambda data: data + b"\0",
    "doubled": lambda data: data + data,
    "deleted": lambda data: None,
}


def _of_files(store: Store, receipt: Receipt) -> Iterator[InjectedFault]:
    for file in receipt.files:
        data = data_path(store, receipt, file.name).read_bytes()
        for name, change in FILES.items():
            changed = change(data)
            if changed != data:
                yield InjectedFault(f"{file.name} {name}", partial(_put_data, receipt, file.name, changed))


def _put_data(receipt: Receipt, name: str, data: bytes | None, store: Store) -> None:
    put(data_path(store, receipt, name), data)


# ---- whole artifacts ---------------------------------------------------------------------------------------


def _of_wholes(receipt: Receipt, others: Sequence[Receipt]) -> Iterator[InjectedFault]:
    first = receipt.files[0].name
    for name in ("extra.bin", "inner/adapter_config.json", f"{first}.bak"):
        yield InjectedFault(f"a file {name} too many", partial(_add, receipt, name))
    yield InjectedFault("an older version of its files", partial(_replay, receipt))
    yield InjectedFault(
        "the files of a new version under the old receipt", partial(_new_files_under_old_receipt, receipt)
    )
    for other in others:
        yield InjectedFault(f"the files of {other.label} {other.key[:6]}", partial(_take_files, receipt, other))
        yield InjectedFault(
            f"files exchanged with {other.label} {other.key[:6]}", partial(_exchange_files, receipt, other)
        )
        yield InjectedFault(f"all exchanged with {other.label} {other.key[:6]}", partial(_exchange_all, receipt, other))


def _add(receipt: Receipt, name: str, store: Store) -> None:
    path = data_path(store, receipt, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")


def again(store: Store, receipt: Receipt, ref: Ref, files: Mapping[str, bytes], **changes: Any) -> Receipt:
    """Commits these files as `ref`, with the other fields of the receipt except `changes`."""
    with store.scratch() as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        said: Body = {
            "schema": receipt.schema,
            "rows": receipt.rows,
            "tokens": receipt.tokens,
            "settings": receipt.settings,
            "parents": receipt.parents,
            "info": receipt.info,
        }
        return store.commit(ref, folder, **(said | changes))


def bytes_of(store: Store, receipt: Receipt) -> dict[str, bytes]:
    return {file.name: data_path(store, receipt, file.name).read_bytes() for file in receipt.files}


def version(store: Store, receipt: Receipt, ref: Ref) -> Receipt:
    """Commits a different version of an artifact, with files of the same sizes, as `ref`."""
    return again(store, receipt, ref, {name: flip(0.5)(data) or b"" for name, data in bytes_of(store, receipt).items()})


def _replay(receipt: Receipt, store: Store) -> None:
    old = bytes_of(store, receipt)
    new = version(store, receipt, receipt.ref)
    for name, data in old.items():
        put(data_path(store, new, name), data)


def _new_files_under_old_receipt(receipt: Receipt, store: Store) -> None:
    old = receipt_path_in(store, receipt).read_bytes()
    new = bytes_of(store, version(store, receipt, receipt.ref))
    put(receipt_path_in(store, receipt), old)
    for name, data in new.items():
        put(data_path(store, receipt, name), data)


def _take_files(receipt: Receipt, other: Receipt, store: Store) -> None:
    theirs = bytes_of(store, other)
    for file in receipt.files:
        put(data_path(store, receipt, file.name), theirs.get(file.name))


def _exchange_files(receipt: Receipt, other: Receipt, store: Store) -> None:
    own = bytes_of(store, receipt)
    _take_files(receipt, other, store)
    for file in other.files:
        put(data_path(store, other, file.name), own.get(file.name))


def _exchange_all(receipt: Receipt, other: Receipt, store: Store) -> None:
    """Exchanges the data and receipts of two artifacts, each under the other's key."""
    one, two = (Path(store.path(layout.key_folder(each.kind, each.key))) for each in (receipt, other))
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    first, second = (receipt_path_in(store, each).read_bytes() for each in (receipt, other))
    put(receipt_path_in(store, receipt), second)
    put(receipt_path_in(store, other), first)


# ---- receipts ----------------------------------------------------------------------------------------------


def reseal(data: bytes, change: Callable[[Body], object]) -> bytes:
    """Changes the body of a receipt and seals it again."""
    body = json.loads(data)
    body.pop("seal")
    change(body)
    return canonical_json(body | {"seal": sha256_bytes(canonical_json(body))})


def _edit(change: Callable[[Body], object]) -> Change:
    """Returns a change of a receipt that keeps its old seal."""

    def edited(data: bytes) -> bytes:
        body = json.loads(data)
        change(body)
        return canonical_json(body)

    return edited


def _sealed(change: Callable[[Body], object]) -> Change:
    return lambda data: reseal(data, change)


def _set(**values: Any) -> Callable[[Body], object]:
    return lambda body: body.update(values)


def _first_file(**values: Any) -> Callable[[Body], object]:
    return lambda body: body["files"][0].update(values)


ZEROS = "0" * 64
RECEIPTS: Mapping[str, Change] = {
    **{name: FILES[name] for name in FILES if name != "doubled"},
    "line feed appended": lambda data: data + b"\n",
    "as UTF-16": lambda data: data.decode().encode("utf-16"),
    "with a byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "with spaces": lambda data: json.dumps(json.loads(data), indent=1).encode(),
    "not UTF-8": lambda data: data.replace(b'"kind":"', b'"kind":"\xff', 1),
    "NaN for rows": lambda data: re.sub(rb'"rows":\d+', b'"rows":NaN', data),
    "half a character": lambda data: data.replace(b'"host":"', b'"host":"\\ud800', 1),
    "ten thousand brackets": lambda data: b"[" * 10_000,
    "null": lambda data: b"null",
    "a list": lambda data: b"[" + data + b"]",
    "a number": lambda data: b"17",
    "an empty object": lambda data: b"{}",
    "edited rows": _edit(lambda body: body.update(rows=body["rows"] + 1)),
    "edited tokens": _edit(lambda body: body.update(tokens=body["tokens"] + 1)),
    "edited parents": _edit(_set(parents=[ZEROS])),
    "edited settings": _edit(lambda body: body["settings"].update(extra=1)),
    "edited info": _edit(lambda body: body["info"].update(extra=1)),
    "edited label": _edit(_set(label="other")),
    "edited key": _edit(_set(key=ZEROS)),
    "edited kind": _edit(_set(kind="blocks2")),
    "edited schema": _edit(_set(schema=2)),
    "edited sha256": _edit(_first_file(sha256=ZEROS)),
    "edited size": _edit(lambda body: body["files"][0].update(size=body["files"][0]["size"] + 1)),
    "edited name of a file": _edit(_first_file(name="other")),
    "no files": _edit(_set(files=[])),
    "no seal": _edit(lambda body: body.pop("seal")),
    "sealed: another key": _sealed(_set(key=ZEROS)),
    "sealed: a key of another form": _sealed(_set(key="../x")),
    "sealed: an unknown kind": _sealed(_set(kind="other")),
    "sealed: another sha256": _sealed(_first_file(sha256=ZEROS)),
    "sealed: another size": _sealed(lambda body: body["files"][0].update(size=body["files"][0]["size"] + 1)),
    "sealed: another name of a file": _sealed(_first_file(name="other")),
    "sealed: a file elsewhere": _sealed(_first_file(name="../../../../receipts/x")),
    "sealed: a field too many": _sealed(_set(extra=1)),
    "sealed: no rows": _sealed(lambda body: body.pop("rows")),
    "sealed: rows as text": _sealed(_set(rows="5")),
    "sealed: files null": _sealed(_set(files=None)),
    "sealed: files of text": _sealed(_set(files=["x"])),
    "sealed: no file": _sealed(_set(files=[])),
    "sealed: parents as text": _sealed(_set(parents="abc")),
    "sealed: settings as a list": _sealed(_set(settings=[])),
}


def _of_receipts(store: Store, receipt: Receipt, others: Sequence[Receipt]) -> Iterator[InjectedFault]:
    data = receipt_path_in(store, receipt).read_bytes()
    for name, change in RECEIPTS.items():
        changed = change(data)
        if changed == data:
            raise ValueError(f"the fault {name!r} does not change the receipt")
        yield InjectedFault(f"receipt {name}", partial(_put_receipt, receipt, changed))
    for other in others:
        theirs = receipt_path_in(store, other).read_bytes()
        yield InjectedFault(f"receipt of {other.label} {other.key[:6]}", partial(_put_receipt, receipt, theirs))


def _put_receipt(receipt: Receipt, data: bytes | None, store: Store) -> None:
    put(receipt_path_in(store, receipt), data)


# ---- artifacts with a receipt that fits --------------------------------------------------------------------


def forge_targets(store: Store, ref: Ref, original: TargetRows, shift_rows: int = 0, shift_vectors: int = 0) -> Receipt:
    """Commits the rows of other targets, rolled by rows or by vectors, as `ref`, with the key of `ref` in the file."""
    rows = np.roll(np.arange(len(original)), shift_rows)
    with store.scratch() as folder:
        with ArrowWriter(folder / TARGETS_FILE, TARGETS_SCHEMA, file_metadata(original.codec, ref, {})) as writer:
            digests = [int(value).to_bytes(8, "little") for value in original.digests[rows]]
            payload = np.roll(original.payload(rows), shift_vectors, axis=0)
            write_rows(writer, digests, original.counts[rows], payload)
        return store.commit(ref, folder, schema=1, rows=len(rows), tokens=0, settings={}, parents=[])
