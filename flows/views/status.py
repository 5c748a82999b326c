"""Prints the state of a recipe's artifacts by stage: wanted, done, missing, failed, bytes.

    show_status(recipe, stage_rows(workspace))

For `distil status` and `distil verify`. Starts no server and imports no Prefect.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.markup import escape

from flows.inventory import StageRow
from flows.views.tables import Table, console, plain, show_json, show_table, size
from tasks.recipe.config import Recipe

NAMES_SHOWN = 20


def show_status(recipe: Recipe, rows: Sequence[StageRow], *, as_json: bool = False) -> None:
    """Prints the table, then the labels of missing and failed artifacts; or all of it as JSON, by stage."""
    if as_json:
        show_json({row.stage: {name: value for name, value in asdict(row).items() if name != "stage"} for row in rows})
        return
    show_table(status_table(f"{recipe.name}: {recipe.store}", rows))
    output = console()
    for row in rows:
        for label, reason in row.failed.items():
            output.print(f"failed   {escape(named(row.stage, label, reason))}", soft_wrap=True, highlight=False)
        for label in row.missing[:NAMES_SHOWN]:
            output.print(f"missing  {row.stage} {escape(label)}", soft_wrap=True, highlight=False)
        if len(row.missing) > NAMES_SHOWN:
            output.print(f"missing  {row.stage} and {len(row.missing) - NAMES_SHOWN} more")


def status_table(title: str, rows: Iterable[StageRow]) -> Table:
    """Counts and bytes by stage."""
    header = ("stage", "wanted", "done", "missing", "failed", "bytes")
    lines = []
    for row in rows:
        counts = (row.wanted, row.done, len(row.missing), len(row.failed))
        lines.append((row.stage, *map(str, counts), size(row.bytes)))
    return Table(title, {"": lines}, header, right_aligned=True)


def named(kind: str, label: str, reason: str) -> str:
    """The reason, preceded by the name of the artifact unless it starts with it."""
    reason = plain(reason)  # it may contain names from the corpus
    return reason if reason.startswith(f"{kind} {label}") else f"{kind} {label}: {reason}"
