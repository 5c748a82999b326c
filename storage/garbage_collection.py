"""Lists or deletes the files of a store that no kept artifact refers to: `distil gc`.

paths = gc(store, keep, delete=False)       # a dry run; `keep` is a set of (kind, key)
"""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from storage import layout
from storage.artifact import KINDS, Ref
from storage.store import Store

DAY = 86_400.0


def _still_older(store: Store, paths: Sequence[str], before: float) -> list[str]:
    folders = {"/".join(path.split("/")[:2]) for path in paths}
    details = {path: detail for folder in sorted(folders) for path, detail in store.find(folder).items()}
    return [path for path in paths if path in details and _is_listed_older(details[path], before)]


def gc(store: Store, keep: set[tuple[str, str]], *, delete: bool = False, min_age: float = DAY) -> list[str]:
    """Lists the files of the store that no (kind, key) in `keep` needs and that are older than `min_age` seconds.

    The paths include abandoned work in progress, and data that a newer receipt of the same key no longer lists. If
    `delete` is set, the files are also deleted: receipts first, so that a partly deleted artifact has no receipt.
    """
    before = time.time() - min_age
    receipts, data = [], []
    for kind in KINDS:
        named = _named_content(store, kind, keep)
        for path, detail in store.find(layout.receipts_folder(kind)).items():
            key = path.rsplit("/", 1)[-1].split(".", 1)[0]
            if (kind, key) not in keep and _is_listed_older(detail, before):
                receipts.append(path)
        for path, detail in store.find(layout.data_folder(kind)).items():
            key, content = path.split("/")[2:4]
            if (key, content) not in named and _is_listed_older(detail, before):
                data.append(path)
    # The scratch folder is local even if the store is remote.
    files = (Path(parent, name) for parent, _, names in os.walk(store.scratch_folder) for name in names)
    scratch = [path for path in files if _is_older(path, before)]
    if delete:
        # Reading the receipts takes time; a file that was rewritten since the listing must be kept.
        store.remove_all(_still_older(store, receipts, before))
        store.remove_all(_still_older(store, data, before))
        for file in scratch:
            file.unlink(missing_ok=True)
    return [*receipts, *data, *(os.fspath(file) for file in scratch)]


def _named_content(store: Store, kind: str, keep: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Returns the (key, content) pairs of the kept receipts of one kind. Reads no other receipts."""
    kept = store.receipts_of(Ref(kind, key, key[:12]) for kept_kind, key in keep if kept_kind == kind)
    return {(receipt.key, receipt.content) for receipt in kept}


def _is_older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:
        return False  # its job ended after the listing


def _is_listed_older(detail: dict[str, Any], before: float) -> bool:
    """Returns True if a listed file is known to be older than `before` (Unix time)."""
    stamp = detail.get("mtime") or detail.get("LastModified") or detail.get("created")
    if isinstance(stamp, datetime):
        stamp = stamp.timestamp()
    return isinstance(stamp, int | float) and stamp < before
