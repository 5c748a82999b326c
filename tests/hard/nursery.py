"""A process that has imported all that a flow needs, and forks one `distil` command after the other from there.

    python -m tests.hard.nursery          started by crash.py; PREFECT_API_URL names the server for all of them

Reads lines of JSON with `arguments`, `folder`, `variables`; answers each with {"pid": ...} at once and {"status": ...}
when that command has ended (negative: by a signal). What it said is in folder/log. All these imports take ten seconds.
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
from tests.hard.points import FLOW, FOLDER, arm


def become(arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    """This forked process is the command from now on."""
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
    """Until our own input ends. Returns never in a child, which leaves by SystemExit."""
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
        raise RuntimeError(f"threads do not survive a fork: {threading.enumerate()}")
    print(json.dumps({"ready": True}), flush=True)
    serve()
