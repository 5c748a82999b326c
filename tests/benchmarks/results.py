"""Shared by the benchmarks: CPU time, the name of the hardware, and one table written as Markdown and JSON.

    publish(Report("corpus", "Corpus", facts, rows, notes), RESULTS)      # prints, and writes both files

A file is named by date, hardware and benchmark, so results of several machines can be kept in one folder.
"""

import datetime
import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
TEACHER = REPO / "deployments" / "demo" / "teacher"
CORPUS = REPO / "deployments" / "demo" / "corpus"


@dataclass(frozen=True)
class Row:
    """One row: `ours` and `compared` in one unit, by which factor ours is better, and the factor to reach."""

    what: str
    unit: str
    ours: float
    compared: float | None = None
    ratio: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class Report:
    """A table of dataclasses of one type, and the conditions of the measurement."""

    name: str
    title: str
    facts: Mapping[str, str]
    rows: Sequence[Any]
    notes: str = ""


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def least_cpu(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least CPU seconds of each function over `repeats` rounds; they alternate, so load hits all alike."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for number, function in enumerate(functions):
            start = cpu_seconds()
            function()
            best[number] = min(best[number], cpu_seconds() - start)
    return best


def hardware(device: str = "cpu") -> str:
    """Short name of the machine for the table and its file name."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name().replace("NVIDIA ", "")
    cores = len(os.sched_getaffinity(0))
    return f"CPU {cores} core{'s' if cores > 1 else ''}"


def shown(path: Path) -> str:
    """The path relative to the checkout; outside of it the name alone."""
    path = path.resolve()
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def facts_of(device: str = "cpu", **more: str) -> dict[str, str]:
    """Date and hardware, then the other conditions that the results depend on."""
    import torch

    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return {"date": today(), "hardware": f"{hardware(device)}, {threads}, torch {torch.__version__}", **more}


def markdown(report: Report) -> str:
    """Title, facts, table, notes."""
    names = [field.name for field in fields(report.rows[0])]
    lines = [f"# {report.title}", "", *(f"- {name}: {value}" for name, value in report.facts.items()), ""]
    lines += [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(_cell(getattr(row, name)) for name in names)} |" for row in report.rows]
    return "\n".join([*lines, "", *([report.notes.strip(), ""] if report.notes else [])])


def publish(report: Report, folder: Path, device: str = "cpu") -> None:
    """Prints the table and writes it as Markdown and JSON."""
    text = markdown(report)
    print(text, flush=True)
    record = {**report.facts, "rows": [asdict(row) for row in report.rows]}
    save(folder, report.name, device, text, record)


def save(folder: Path, name: str, device: str, text: str, record: Mapping[str, Any]) -> None:
    """Writes both files, named by today's date, this machine's hardware and `name`."""
    write_files(folder, f"{today()}-{hardware(device)}-{name}", text, record)


def write_files(folder: Path, name: str, text: str, record: Mapping[str, Any]) -> Path:
    """Writes `text` as Markdown and `record` as JSON; returns the path of the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.lower().replace(' ', '-')}.md"
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def notes_of(docstring: str | None) -> str:
    """The last paragraph of a module's docstring: how to read its figures."""
    return (docstring or "").split("\n\n")[-1].strip()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
