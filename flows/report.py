"""What people see: progress bars while it runs, tables at the end, and the same tables as Prefect artifacts.

Tables go to standard output, bars to standard error.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from storage.artifact import Failure

Rows = Sequence[tuple[str, str]]


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


def failure_rows(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """The failure table as plain values, with the command that tries one shard again."""
    return [
        {
            "stage": failure.kind,
            "shard": failure.label,
            "file": failure.file,
            "line": "" if failure.line is None else failure.line,
            "error": failure.message,
            "how to retry": f"distil retry RECIPE.toml --stage {failure.kind} --shard {failure.label}",
        }
        for failure in failures
    ]


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
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, rows in sections.items():
        if rows:
            table.add_section()
            table.add_row(f"[u]{heading}[/u]", "")
            for name, value in rows:
                table.add_row(escape(name), escape(value))
    _console().print(table)


def markdown_sheet(title: str, sections: Mapping[str, Rows]) -> str:
    """The same table as Markdown, for the Prefect artifact."""
    lines = [f"# {title}"]
    for heading, rows in sections.items():
        if rows:
            lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(lines)


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
