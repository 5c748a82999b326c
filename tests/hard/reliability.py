"""Rewrites the figures of tests/RELIABILITY.md from what the attacks of a night recorded, one JSON object per line.

    record("tests.hard.soak", "350 runs")            # in an attack; counts, {"planted": 84}, are summed per row
    python -m tests.hard.reliability RECORDS.jsonl tests/RELIABILITY.md

`record` appends to the file that DISTIL_RELIABILITY names and does nothing where it is unset. A record belongs to the
row whose column "every night" names its source: a module, or a test file (tests/conftest.py records for each file how
many of its tests passed).
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = "DISTIL_RELIABILITY"
"""Environment variable: the file that records are appended to."""
COLUMNS = ("attack", "what must hold", "every push", "every night", "figures", "date")
SOURCE = re.compile(r"tests[./][\w./]+")
"""A test file or a module in the cells "every push" and "every night"."""


@dataclass(frozen=True)
class Record:
    """The measurement of one attack: counts, which are summed over the records of a row, or a sentence."""

    row: str
    figure: Mapping[str, int] | str
    date: str
    command: str


def record(row: str, figure: Mapping[str, int] | str) -> None:
    """Appends a record of the attack in the test file or module `row`."""
    if path := os.environ.get(FILE):
        date = datetime.now(UTC).date().isoformat()
        line = json.dumps({"row": row, "figure": figure, "date": date, "command": " ".join(sys.argv)})
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def read_records(path: Path) -> list[Record]:
    """All records of a file; none if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def cells_of(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(text: str) -> list[dict[str, str]]:
    """The table's rows by the names of their columns."""
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    assert tuple(rows[0]) == COLUMNS, f"the columns are {rows[0]}"
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]]


def figures_of(records: Sequence[Record]) -> str:
    """The sentences, then the sums: "350 runs; 761 planted, 17 passed"."""
    sums: Counter[str] = Counter()
    sentences: dict[str, None] = {}
    for one in records:
        if isinstance(one.figure, str):
            sentences[one.figure] = None
        else:
            sums.update(one.figure)
    counts = ", ".join(f"{count:,} {name}" for name, count in sums.items())
    return "; ".join([*sentences, *([counts] if counts else [])])


def rewritten(text: str, records: Sequence[Record]) -> str:
    """The document with the figures and dates of the rows that have records; all else stays as it is."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            continue
        cells = cells_of(line)
        sources = set(SOURCE.findall(cells[COLUMNS.index("every night")]))
        own = [one for one in records if one.row in sources]
        if own:
            cells[-2:] = [figures_of(own), max(one.date for one in own)]
            lines[number] = f"| {' | '.join(cells)} |"
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, help="JSON lines of one night")
    parser.add_argument("document", type=Path, help="tests/RELIABILITY.md")
    given = parser.parse_args()
    text = given.document.read_text(encoding="utf-8")
    given.document.write_text(rewritten(text, read_records(given.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
