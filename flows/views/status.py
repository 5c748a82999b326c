"""What a recipe wants, what the store holds of it, what failed.

    rows = stage_rows(store, recipe)        # by stage: wanted, done, missing, failed, bytes

For `distil status`, `verify` and `gc`. Starts no server and imports no Prefect.
"""

from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.inventory import StageRow
from flows.views.tables import plain, size
from tasks.recipe.config import Recipe

NAMES_SHOWN = 20


def as_json(rows: Iterable[StageRow]) -> dict[str, object]:
    """The rows as plain values, by stage."""
    return {row.stage: {name: value for name, value in asdict(row).items() if name != "stage"} for row in rows}


def show(recipe: Recipe, rows: Iterable[StageRow]) -> None:
    """Prints the table, then the names of what is missing or failed."""
    rows = list(rows)
    console = Console()
    table = Table(title=f"{recipe.name}: {recipe.store}", title_justify="left")
    table.add_column("stage")
    for name in ("wanted", "done", "missing", "failed", "bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = (row.wanted, row.done, len(row.missing), len(row.failed))
        table.add_row(row.stage, *(str(count) for count in counts), size(row.bytes))
    console.print(table)
    for row in rows:
        for label, reason in row.failed.items():
            console.print(f"failed   {escape(named(row.stage, label, reason))}", soft_wrap=True, highlight=False)
        for label in row.missing[:NAMES_SHOWN]:
            console.print(f"missing  {row.stage} {escape(label)}", soft_wrap=True, highlight=False)
        if len(row.missing) > NAMES_SHOWN:
            console.print(f"missing  {row.stage} and {len(row.missing) - NAMES_SHOWN} more")


def named(kind: str, label: str, reason: str) -> str:
    """The reason with the name of the artifact before it, unless it names it itself."""
    reason = plain(reason)  # it tells of files that others made
    return reason if reason.startswith(f"{kind} {label}") else f"{kind} {label}: {reason}"
