"""Formats untrusted text as Markdown: it cannot end its line, cell or code span, nor start a heading, link or tag.

    escape_line("a | b * c")                                    # one line in which | and * are escaped
    table(("", "score"), [("ner", "87.1")], numeric=True)
    code_block("print(1)", "python")

The cells of `table` are Markdown; untrusted text must be escaped with `escape_line` first.
"""

import re
from collections.abc import Sequence

from storage.errors import printable


def escape_line(text: str) -> str:
    """Returns any text as one line of plain Markdown text."""
    line = printable(" ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", line)


def code_span(text: str) -> str:
    """Returns any text as inline code."""
    line = " ".join(printable(str(text)).replace("`", "'").split()).replace("|", "¦")
    return f"`{line}`" if line else "``"


def code_block(text: str, language: str) -> str:
    """Returns any text as a fenced code block; its fence is longer than every run of backticks in the text."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = False) -> str:
    """Returns a table of Markdown cells; `numeric` aligns all columns except the first to the right."""
    rules = ["---", *["---:" if numeric else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))
