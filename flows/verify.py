"""Implements `distil verify`: checks every file of a store, and whether a recipe's artifacts are complete.

    verify_store(workspace, "mine.toml")            # hashes every file, lists missing artifacts

storage/verify.py hashes the files; this module compares the store with the recipe and prints the result.
"""

from collections.abc import Sequence

from flows.inventory import stage_rows
from flows.views.status import with_label
from storage.artifact import Fault
from storage.errors import DistilError
from storage.verify import verify
from tasks.lineage import Workspace


def verify_store(workspace: Workspace, command: str) -> None:
    """Hashes every file of the store, withdraws damaged artifacts, and prints them and the recipe's missing artifacts.

    `command` is the recipe file and settings as typed. DistilError with a summary if any file is damaged, unreadable or
    foreign, or any artifact is missing.
    """
    faults = verify(workspace.store)
    for fault in faults:
        print(f"{fault.what:<8} {with_label(fault.ref.kind, fault.ref.label, fault.reason)}")
    damaged = {(fault.ref.kind, fault.ref.label) for fault in faults}
    lacking = [
        (row.stage, label)
        for row in stage_rows(workspace)
        for label in (*row.missing, *row.failed)
        if (row.stage, label) not in damaged
    ]
    for kind, label in lacking:
        print(f"missing  {kind} {label}")
    _raise_if_incomplete(faults, lacking, command)
    print("all artifacts exist and are undamaged")


def _raise_if_incomplete(faults: Sequence[Fault], lacking: Sequence[tuple[str, str]], command: str) -> None:
    withdrawn = sum(fault.withdrawn for fault in faults)
    if unread := sum(fault.what == "unread" for fault in faults):
        print(
            f"{unread} of the files could not be read and were not changed; grant read access or repair the disk, then "
            "run `distil verify` again"
        )
    if withdrawn or lacking:
        # `distil retry` makes artifacts up to the targets; only `distil run` trains.
        verb = "run" if all(kind == "model" for kind, _ in lacking) and not withdrawn else "retry"
        raise DistilError(
            f"artifacts damaged: {withdrawn} (now marked as missing), already missing: {len(lacking)}; "
            f"make them again with `distil {verb} {command}`"
        )
    if stuck := sum(fault.what == "damaged" and not fault.withdrawn for fault in faults):
        raise DistilError(
            f"{stuck} damaged artifacts, listed above, could not be marked as missing; grant write access to "
            "the store, then run `distil verify` again"
        )
    if unread:
        raise DistilError(f"{unread} of the files could not be read, so they may be damaged")
    if faults:
        raise DistilError(f"{len(faults)} of the files in the store do not belong to it; delete them")
