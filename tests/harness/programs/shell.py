"""Runs many `distil` commands in one process, since each new process imports Prefect and torch for seconds.

Reads lines of JSON from standard input, each a list of arguments, and writes for each a line of JSON: [status, output,
errors]. Started by the fixture `shell` in conftest.py.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from flows.cli import main


def answer(arguments: list[str]) -> tuple[int, str, str]:
    """Runs one command as the `distil` script does. Returns its exit status, output and errors."""
    sys.argv = ["distil", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    # Responses use a separate file descriptor, so that output of worker processes cannot mix with them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
