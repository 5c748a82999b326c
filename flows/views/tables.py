"""Prints progress bars and tables on the console, and renders the same tables as Markdown for Prefect artifacts.

    with bar("blocks", total=2000) as advance: advance(1)
    show_table(Table("Scores", {"": rows}, header))

Tables are written to standard output, progress bars to standard error.
"""

import html
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from storage.artifact import Failure
from tasks.recipe.config import Recipe

Rows = Sequence[tuple[str, str]]
"""Rows of a table of names and values."""

CELL_CHARACTERS = 2000
"""Longer text is cut in tables. The store has the complete text."""


@dataclass(frozen=True)
class Table:
    """A table of text. `sections` maps a heading, or "" for none, to rows of cells; empty sections are omitted.

    A table without `header` lists names and values. On the console, `ruled` draws lines between the rows, and
    `right_aligned` applies to all columns but the first.
    """

    title: str
    sections: Mapping[str, Sequence[Sequence[str]]]
    header: Sequence[str] = ()
    ruled: bool = False
    right_aligned: bool = False


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a progress bar. Yields `advance(done, note="")`, which adds to the bar and shows the note at its end."""
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


def failure_rows(recipe: Recipe, failures: Sequence[Failure], command: str = "") -> list[dict[str, Any]]:
    """Returns the failure table as plain values, with the command that retries each shard (see `how_to_retry`).

    Control characters in file names and messages are escaped, as in \\x1b, since both may contain text of the corpus.
    """
    return [
        {
            "stage": failure.kind,
            "shard": failure.label,
            "file": plain(failure.file),
            "line": "" if failure.line is None else failure.line,
            "error": plain(failure.message),
            "how to retry": how_to_retry(recipe, failure.kind, failure.label, command),
        }
        for failure in failures
    ]


def plain(text: str) -> str:
    """Returns the text as one line of printable characters, cut to CELL_CHARACTERS."""
    shown = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    return shown if len(shown) <= CELL_CHARACTERS else f"{shown[:CELL_CHARACTERS]}…"


def how_to_retry(recipe: Recipe, stage: str, shard: str, command: str = "") -> str:
    """Returns how to retry one shard.

    It is a `distil retry` command with the recipe file and settings as typed (`command`). For a run of a deployment,
    where `command` is empty, it refers to the recipe's deployment.
    """
    if command:
        return f"distil retry {command} --stage {stage} --shard {shlex.quote(shard)}"
    return f"press Retry on this run, or run retry-shard/{recipe.name} with stage = {stage} and shard = {shard}"


def how_to_retry_all(recipe: Recipe, command: str = "") -> str:
    """Returns how to retry all failures of a table. Only the run of a deployment has a Retry button in the UI."""
    if command:
        return "Fix the cause, then run the command in the last column, or repeat the run to retry all failures."
    return (
        f"Fix the cause, then press Retry on this run, or run the deployment retry-shard/{recipe.name} with the stage "
        "and shard in the table."
    )


def failure_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of `failure_rows`, which must contain at least one row."""
    return Table("Failed", {"": [[str(value) for value in row.values()] for row in rows]}, list(rows[0]), ruled=True)


def show_table(table: Table) -> None:
    """Prints a table."""
    cells = [cell for rows in table.sections.values() for row in rows for cell in row]
    shown = RichTable(
        title=_shown(table.title),
        title_justify="left",
        show_header=bool(table.header),
        show_lines=table.ruled or (bool(table.header) and any("\n" in cell for cell in cells)),
    )
    name, *others = table.header or ("", "")
    shown.add_column(_shown(name), overflow="fold", style="bold", no_wrap=not table.header)
    for other in others:
        shown.add_column(_shown(other), overflow="fold", justify="right" if table.right_aligned else "left")
    for heading, rows in table.sections.items():
        if rows:
            shown.add_section()
            if heading:
                shown.add_row(f"[u]{_shown(heading)}[/u]")
            for row in rows:
                shown.add_row(*(_shown(cell) for cell in row))
    console().print(shown)


def show_json(value: object) -> None:
    """Prints plain values as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def markdown(*tables: Table) -> str:
    """Renders tables as Markdown, one below the other, for a Prefect artifact."""
    parts: list[str] = []
    for table in tables:
        parts.append(f"# {_literal(table.title)}")
        header = table.header or ("", "")
        for heading, rows in table.sections.items():
            if rows:
                parts += [f"## {_literal(heading)}"] if heading else []
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
    return "\n\n".join(parts)


def _literal(text: str) -> str:
    """Escapes text for Markdown, so that it contains no links, images, cells or HTML, which Prefect would render."""
    return re.sub(r"([\\`*_\[\]|!])", r"\\\1", html.escape(plain(text), quote=False))


def _cell(text: str) -> str:
    """Escapes the text of a cell for Markdown, and keeps its line breaks."""
    return "<br>".join(_literal(line) for line in text.split("\n"))


def _shown(text: str) -> str:
    """Escapes markup and control characters in the text of a cell for the terminal, and keeps its line breaks."""
    return escape("\n".join(map(plain, text.split("\n"))))


def console() -> Console:
    """Returns a console on standard output, 120 columns wide if that is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def size(count: float) -> str:
    """Returns bytes as text: `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """Returns a count as text: `1,234,567`."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """Returns a duration as text: `4.8 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
