"""Prints the numbers of required, finished, missing and failed artifacts of a recipe by stage, and their bytes.

    show_status(recipe, stage_rows(workspace))

Used by `distil status` and `distil verify`. Starts no server and does not import Prefect.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.markup import escape

from flows.inventory import StageRow
from flows.views.tables import Table, console, plain, show_json, show_table, size
from tasks.recipe.config import Recipe

NAMES_SHOWN = 20


def show_status(recipe: Recipe, rows: Sequence[StageRow], *, as_json: bool = False) -> None:
    """Prints the table and the labels of missing and failed artifacts, or the same data as JSON."""
    if as_json:
        show_json({row.stage: {name: value for name, value in asdict(row).items() if name != "stage"} for row in rows})
        return
    show_table(status_table(f"{recipe.name}: {recipe.store}", rows))
    output = console()
    for row in rows:
        for label, reason in row.failed.items():
            output.print(f"failed   {escape(with_label(row.stage, label, reason))}", soft_wrap=True, highlight=False)
        for label in row.missing[:NAMES_SHOWN]:
            output.print(f"missing  {row.stage} {escape(label)}", soft_wrap=True, highlight=False)
        if len(row.missing) > NAMES_SHOWN:
            output.print(f"missing  {row.stage} and {len(row.missing) - NAMES_SHOWN} more")


def status_table(title: str, rows: Iterable[StageRow]) -> Table:
    """Returns a table of counts and bytes by stage."""
    header = ("stage", "required", "done", "missing", "failed", "bytes")
    lines = []
    for row in rows:
        counts = (row.wanted, row.done, len(row.missing), len(row.failed))
        lines.append((row.stage, *map(str, counts), size(row.bytes)))
    return Table(title, {"": lines}, header, right_aligned=True)


def with_label(kind: str, label: str, reason: str) -> str:
    """Returns the reason with the kind and label of the artifact in front, unless it starts with them."""
    reason = plain(reason)  # it may contain names from the corpus
    return reason if reason.startswith(f"{kind} {label}") else f"{kind} {label}: {reason}"
