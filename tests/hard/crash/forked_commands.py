"""Imports the modules of a flow once, which takes ten seconds, and then forks a process for each `distil` command.

    python -m tests.hard.crash.forked_commands      started by matrix.py; all commands use the server at PREFECT_API_URL

Reads lines of JSON with `arguments`, `folder` and `variables`. Responds to each at once with {"pid": ...}, and with
{"status": ...} when the command has ended; a negative status is a signal number. Its output is written to folder/log.
"""

import json
import os
import sys
import threading
from pathlib import Path

import mlflow.transformers  # noqa: F401
import transformers.pipelines  # noqa: F401

import flows.inventory  # noqa: F401
from flows.cli import main
from tests.hard.crash.points import FLOW, FOLDER, arm


def become(arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Runs the command in this forked process."""
    os.setsid()
    os.environ |= variables
    with (folder / "log").open("ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if FOLDER in variables:
        Path(variables[FOLDER], FLOW).write_text(str(os.getpid()), encoding="utf-8")
        arm()
    sys.argv = ["distil", *arguments]
    main()


def serve() -> None:
    """Runs commands until standard input ends. Forked children never return; they raise SystemExit."""
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            become(asked["arguments"], Path(asked["folder"]), asked["variables"])
            sys.exit(0)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    if threading.active_count() > 1:
        raise RuntimeError(f"a process with several threads cannot be forked safely: {threading.enumerate()}")
    print(json.dumps({"ready": True}), flush=True)
    serve()
