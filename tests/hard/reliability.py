"""Rewrites the figures of tests/RELIABILITY.md from the records of the nightly fault-injection tests.

    record("tests.hard.soak.soak", "350 runs")        # in a test; counts, such as {"planted": 84}, are summed per row
    python -m tests.hard.reliability RECORDS.jsonl tests/RELIABILITY.md

`record` appends a line of JSON to the file DISTIL_RELIABILITY, and does nothing if that variable is not set. A record
belongs to the row whose column "every night" contains its source: a module, or a test file (tests/conftest.py records
the number of tests that passed in each file).
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
"""Environment variable with the path of the file that records are appended to."""
COLUMNS = ("attack", "what must hold", "every push", "every night", "figures", "date")
SOURCE = re.compile(r"tests[./][\w./]+")
"""Matches a test file or a module in the columns "every push" and "every night"."""


@dataclass(frozen=True)
class Record:
    """The result of one fault-injection test: counts, which are summed over the records of a row, or a sentence."""

    row: str
    figure: Mapping[str, int] | str
    date: str
    command: str


def record(row: str, figure: Mapping[str, int] | str) -> None:
    """Appends a record of the fault-injection test in the test file or module `row`."""
    if path := os.environ.get(FILE):
        date = datetime.now(UTC).date().isoformat()
        line = json.dumps({"row": row, "figure": figure, "date": date, "command": " ".join(sys.argv)})
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def read_records(path: Path) -> list[Record]:
    """Returns all records of a file, or an empty list if the file does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def cells_of(line: str) -> list[str]:
    """Returns the cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(text: str) -> list[dict[str, str]]:
    """Returns the rows of the table, each as a mapping of column names to cells."""
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    assert tuple(rows[0]) == COLUMNS, f"the table has the columns {rows[0]} instead of {COLUMNS}"
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]]


def figures_of(records: Sequence[Record]) -> str:
    """Returns the sentences, then the sums of the counts: "350 runs; 761 planted, 17 passed"."""
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
    """Returns the document with new figures and dates in the rows that have records, and no other change."""
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
    """Rewrites the document named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, help="file with the records of one night, one JSON object per line")
    parser.add_argument("document", type=Path, help="document to rewrite: tests/RELIABILITY.md")
    given = parser.parse_args()
    text = given.document.read_text(encoding="utf-8")
    given.document.write_text(rewritten(text, read_records(given.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
