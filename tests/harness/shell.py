"""One process that runs many `distil` commands, since importing Prefect and torch costs seconds for each.

Reads lines of JSON, each a list of arguments, and answers each with a line of [status, output, errors].
Started by the fixture `shell` in conftest.py.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from flows.cli import main


def answer(arguments: list[str]) -> tuple[int, str, str]:
    """Runs one command as the `distil` script would."""
    sys.argv = ["distil", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    # Answers have a channel of their own: what worker processes print must not get between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
