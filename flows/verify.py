"""Checks a store against a recipe: the body of `distil verify`.

    verify_store(workspace, "mine.toml")            # hashes every file, lists what the recipe lacks

storage/verify.py hashes the files; this module compares the store with the recipe and prints the result.
"""

from collections.abc import Sequence

from flows.inventory import stage_rows
from flows.views.status import named
from storage.artifact import Fault
from storage.errors import DistilError
from storage.verify import verify
from tasks.lineage import Workspace


def verify_store(workspace: Workspace, command: str) -> None:
    """Hashes every file of the store again, withdraws damaged artifacts, and prints those and what the recipe lacks.

    `command` is the recipe file and settings as typed. DistilError with a summary unless everything is complete.
    """
    faults = verify(workspace.store)
    for fault in faults:
        print(f"{fault.what:<8} {named(fault.ref.kind, fault.ref.label, fault.reason)}")
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
    print("every artifact is complete and none is missing")


def _raise_if_incomplete(faults: Sequence[Fault], lacking: Sequence[tuple[str, str]], command: str) -> None:
    withdrawn = sum(fault.withdrawn for fault in faults)
    if unread := sum(fault.what == "unread" for fault in faults):
        print(f"{unread} could not be read and are left as they are; give access, or repair the disk, and verify again")
    if withdrawn or lacking:
        # A retry ends at the targets; only a run trains.
        verb = "run" if all(kind == "model" for kind, _ in lacking) and not withdrawn else "retry"
        raise DistilError(
            f"{withdrawn} damaged and withdrawn, {len(lacking)} missing; `distil {verb} {command}` makes them again"
        )
    if stuck := sum(fault.what == "damaged" and not fault.withdrawn for fault in faults):
        raise DistilError(f"{stuck} damaged, but could not be withdrawn; verify again with write access")
    if unread:
        raise DistilError(f"{unread} could not be read, so it is unknown whether they are intact")
    if faults:
        raise DistilError(f"{len(faults)} files in the store do not belong to it; delete them")
