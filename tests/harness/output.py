"""Parses the output of `distil` commands: their tables and error messages."""

import re

from tests.harness.project import Result


def tables(out: str) -> list[list[str]]:
    """Returns the rows of all tables in an output, without white space in the cells, since long words are wrapped."""
    rows: list[list[str]] = []
    inside = False
    for line in out.splitlines():
        cells = ["".join(cell.split()) for cell in re.split("[│┃]", line)[1:-1]]
        if cells and inside:
            rows[-1] = [before + cell for before, cell in zip(rows[-1], cells, strict=True)]
        elif cells:
            rows.append(cells)
        inside = bool(cells)
    return rows


def refusal(result: Result) -> str:
    """Returns the error message of a failed command, which must have status 1, one message and no traceback."""
    assert result.status == 1, result
    assert "Traceback" not in result.out + result.err
    said = [line for line in result.err.splitlines() if line.startswith("distil: ")]
    assert len(said) == 1, result.err
    return said[0]
