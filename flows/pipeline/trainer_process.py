"""Starts the trainer as a separate process, follows its metrics.jsonl, and ends it with the flow.

    result = launch_trainer(run, follow)    # `python -m tasks.train RUN.json`, torchrun, or `train.launcher`

When this process is stopped, the trainer gets SIGTERM and GRACE_SECONDS to write a checkpoint. tasks/parent_death.py
lists the mechanisms that end the trainer if this process dies.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.pipeline.task_policy import GRACE_SECONDS
from flows.services.process import with_repo_on_path
from storage.errors import FatalError, RetryableError
from tasks.parent_death import signal_on_parent_death
from tasks.recipe.run_json import EXIT_RETRYABLE, METRICS, RunSpec, write_run

POLL_SECONDS = 0.5

Line = dict[str, Any]


def launch_trainer(run: RunSpec, follow: Callable[[list[Line], bool], None]) -> dict[str, Any]:
    """Runs the trainer to its end and returns the content of result.json.

    `follow` receives the new lines of metrics.jsonl (all lines if the trainer has truncated the file), and whether the
    call is the last one. FatalError with the trainer's last line of output if the trainer fails or is stopped by a
    different process. RetryableError if it exits with EXIT_RETRYABLE; torchrun does not forward this status.
    """
    folder = Path(run.folder)
    path = write_run(run)
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    log = folder / "train.log"
    with log.open("wb") as output:
        process = _start(run, path, output)
        try:
            status = _wait(process, folder / METRICS, follow)
        finally:
            _stop(process)
    if status == EXIT_RETRYABLE:
        raise RetryableError(_reason(folder, status), str(log))
    if status != 0:
        raise FatalError(_reason(folder, status), str(log))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def command(run: RunSpec, path: Path) -> list[str]:
    """Returns the command of the trainer: `train.launcher` if set, torchrun for several ranks, else plain Python.

    Plain Python starts faster than torchrun. A launcher must start the trainer on other machines, wait for it and
    forward SIGTERM.
    """
    if run.train.launcher:
        return [part.replace("{run}", str(path)).replace("{folder}", run.folder) for part in run.train.launcher]
    trainer = ["-m", "tasks.train", str(path)]
    if run.train.ranks == 1:
        return [sys.executable, *trainer]
    logs = ["--log-dir", str(path.parent / "ranks"), "--redirects", "3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.train.ranks), *logs]
    return [sys.executable, *torchrun, *trainer]


def _start(run: RunSpec, path: Path, output: Any) -> subprocess.Popen[bytes]:
    # The trainer uses no server, so it does not get the variables that contain passwords.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{GRACE_SECONDS:.0f}")  # torchrun's default: 30 s
    return subprocess.Popen(
        command(run, path),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=with_repo_on_path(environment),
        start_new_session=True,
        preexec_fn=signal_on_parent_death(),
    )


class Tail:
    """Reads the complete lines that were appended to a JSON lines file since the last call."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._inode = path, 0, -1

    def lines(self) -> list[Line]:
        """Returns the new lines, or all lines if the file was replaced: the trainer truncates it by replacing it."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset if inode == self._inode else 0)
            start = file.tell()
            complete, newline, _ = file.read().rpartition(b"\n")
        self._inode, self._offset = inode, start + len(complete) + len(newline)
        return [json.loads(line) for line in complete.split(b"\n") if line]


def _wait(process: subprocess.Popen[bytes], metrics: Path, follow: Callable[[list[Line], bool], None]) -> int:
    """Follows the metrics file until the trainer ends, and returns the trainer's exit status."""
    tail = Tail(metrics)
    while process.poll() is None:
        if fresh := tail.lines():
            follow(fresh, False)
        time.sleep(POLL_SECONDS)
    follow(tail.lines(), True)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the trainer if it still runs: SIGTERM, then SIGKILL to its process group after at most GRACE_SECONDS."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also ends processes that the trainer left in its group
    process.wait()


def _reason(folder: Path, status: int) -> str:
    """Returns a message with the trainer's last line of output; with several ranks, of the first rank with output."""
    for log in (*sorted((folder / "ranks").glob("**/stderr.log")), folder / "train.log"):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        output = [line.strip() for line in lines if line.strip()]
        if output:
            return f"training ended with status {status}: {output[-1]} (log: {log})"
    return f"training ended with status {status} without any output (log: {folder / 'train.log'})"
