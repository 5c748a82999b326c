"""What people see: progress bars while it runs, tables at the end, and the same tables as Prefect artifacts.

Tables go to standard output, bars to standard error.
"""

import html
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flows.home import TYPED_COMMAND
from storage.artifact import Failure
from tasks.recipe.config import Recipe

Rows = Sequence[tuple[str, str]]

TextTable = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Cells of the heading, and rows of cells."""

CELL_CHARACTERS = 2000
"""A longer error is cut in the tables; the store keeps it whole."""


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; the function it gives takes how much was done, and optionally a `note` to show at its end."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            progress.update(task, advance=done, **({"note": note} if note else {}))  # type: ignore[arg-type]

        yield advance


def failure_rows(recipe: Recipe, failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """The failure table as plain values, with the command that tries one shard again.

    File names and messages come from the corpus: what is not to be printed is shown as \\x1b and the like.
    """
    return [
        {
            "stage": failure.kind,
            "shard": failure.label,
            "file": plain(failure.file),
            "line": "" if failure.line is None else failure.line,
            "error": plain(failure.message),
            "how to retry": how_to_retry(recipe, failure.kind, failure.label),
        }
        for failure in failures
    ]


def plain(text: str) -> str:
    """One line of printable characters, CELL_CHARACTERS at most, of any text."""
    shown = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    return shown if len(shown) <= CELL_CHARACTERS else f"{shown[:CELL_CHARACTERS]}…"


def how_to_retry(recipe: Recipe, stage: str, shard: str) -> str:
    """The command with the recipe and overrides of this run; of a run that came from a deployment, the deployment."""
    typed = os.environ.get(TYPED_COMMAND)
    if typed:
        return f"distil retry {typed} --stage {stage} --shard {shlex.quote(shard)}"
    return f"Retry on this run, or run retry-shard/{recipe.name} with stage = {stage} and shard = {shard}"


def all_again(recipe: Recipe) -> str:
    """What to do about a whole failure table; only a run that came from a deployment has Retry in the UI."""
    if os.environ.get(TYPED_COMMAND):
        return (
            "Mend the cause, then run the command in the last column, or the same run again, which makes all of them."
        )
    return (
        f"Mend the cause, then press Retry on this run, or run the deployment retry-shard/{recipe.name} with stage and "
        "shard as in the table."
    )


def show_failures(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the failure table."""
    table = Table(title="Failed", title_justify="left", show_lines=True)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    _console().print(table)


def show_sheet(title: str, sections: Mapping[str, Rows]) -> None:
    """Prints a two-column table with a heading for every section that has rows."""
    table = Table(title=_shown(title), title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, rows in sections.items():
        if rows:
            table.add_section()
            table.add_row(f"[u]{heading}[/u]", "")
            for name, value in rows:
                table.add_row(_shown(name), _shown(value))
    _console().print(table)


def markdown_sheet(title: str, sections: Mapping[str, Rows]) -> str:
    """The same table as Markdown, for the Prefect artifact."""
    lines = [f"# {_literal(title)}"]
    for heading, rows in sections.items():
        if rows:
            lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| {_literal(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Text that Markdown shows as it is: no tags (Prefect's page takes raw HTML), links, images or new cells."""
    return re.sub(r"([\\`*_\[\]|!])", r"\\\1", html.escape(plain(text), quote=False))


def show_table(title: str, table: TextTable) -> None:
    """Prints a table with a heading line: header cells, rows of cells."""
    header, rows = table
    shown = Table(
        title=_shown(title), title_justify="left", show_lines=any("\n" in cell for row in rows for cell in row)
    )
    for number, name in enumerate(header):
        shown.add_column(_shown(name), overflow="fold", style="bold" if number == 0 else "")
    for row in rows:
        shown.add_row(*(_shown(cell) for cell in row))
    _console().print(shown)


def markdown_tables(tables: Mapping[str, TextTable]) -> str:
    """The same tables as Markdown, each below its title."""
    return "\n\n".join(f"# {_literal(title)}\n\n{markdown_table(table)}" for title, table in tables.items())


def markdown_table(table: TextTable) -> str:
    """One table as Markdown."""
    header, rows = table
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text of a cell as it is; its lines stay lines."""
    return "<br>".join(_literal(line) for line in text.split("\n"))


def _shown(text: str) -> str:
    """Text of a cell for the terminal: no markup, no escape codes; its lines stay lines."""
    return escape("\n".join(map(plain, text.split("\n"))))


def _console() -> Console:
    """Standard output; wider than rich's 80 columns where it is no terminal but a log."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def size(count: float) -> str:
    """Bytes for people: `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """A count with thin groups: `1,234,567`."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """A duration for people: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
