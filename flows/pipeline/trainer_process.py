"""Starts the trainer as a process of its own, passes signals on, follows metrics.jsonl while it runs.

    result = launch(run, follow)      # python -m tasks.train RUN.json, torchrun for several ranks, or train.launcher

The trainer has its own process group and is told to stop when this process dies, so no torchrun is left behind. When
this process is asked to stop, the trainer gets SIGTERM and time to write a checkpoint.
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

from flows.services.process import with_repo_on_path
from storage.errors import FatalError, RetryableError
from tasks.parent_death import signal_on_parent_death
from tasks.recipe.run_spec import EXIT_RETRYABLE, METRICS, RunSpec, write_run

GRACE_SECONDS = 60.0
"""Time that a trainer gets for its checkpoint after SIGTERM."""


POLL_SECONDS = 0.5

Line = dict[str, Any]


def launch_trainer(run: RunSpec, follow: Callable[[list[Line], bool], None]) -> dict[str, Any]:
    """Trains to the end and returns result.json. `follow` gets the new lines of metrics.jsonl (all of them again after
    the trainer has cut the file back), and whether these are the last ones.

    FatalError with the trainer's own last sentence if it fails, or if somebody else stopped it; RetryableError if one
    rank says that its error may pass (torchrun does not hand that on).
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
    """How the trainer is started; torchrun only where there are several ranks, since it takes seconds to start.

    A launcher of the recipe starts it on other machines, follows it there and passes SIGTERM on.
    """
    if run.train.launcher:
        return [word.replace("{run}", str(path)).replace("{folder}", run.folder) for word in run.train.launcher]
    trainer = ["-m", "tasks.train", str(path)]
    if run.train.ranks == 1:
        return [sys.executable, *trainer]
    logs = ["--log-dir", str(path.parent / "ranks"), "--redirects", "3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.train.ranks), *logs]
    return [sys.executable, *torchrun, *trainer]


def _start(run: RunSpec, path: Path, output: Any) -> subprocess.Popen[bytes]:
    # The trainer calls no server, so it is told no password.
    told = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    told.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{GRACE_SECONDS:.0f}")  # torchrun kills after 30 s by itself
    return subprocess.Popen(
        command(run, path),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=with_repo_on_path(told),
        start_new_session=True,
        preexec_fn=signal_on_parent_death(),
    )


class Tail:
    """Whole lines that a file has got since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._file = path, 0, -1

    def lines(self) -> list[Line]:
        """All of them if the file is another one than before; the trainer replaces it when it cuts it back."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            file.seek(self._offset if number == self._file else 0)
            start = file.tell()
            whole, newline, _ = file.read().rpartition(b"\n")
        self._file, self._offset = number, start + len(whole) + len(newline)
        return [json.loads(line) for line in whole.split(b"\n") if line]


def _wait(process: subprocess.Popen[bytes], metrics: Path, follow: Callable[[list[Line], bool], None]) -> int:
    """Follows the metrics file until the trainer ends; returns its exit status."""
    tail = Tail(metrics)
    while process.poll() is None:
        if fresh := tail.lines():
            follow(fresh, False)
        time.sleep(POLL_SECONDS)
    follow(tail.lines(), True)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the trainer if it still runs: SIGTERM, time for a checkpoint, then SIGKILL for the whole group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of the group, if anything
    process.wait()


def _reason(folder: Path, status: int) -> str:
    """The trainer's last sentence. With several ranks each has a log of its own; the first that says something wins."""
    for log in (*sorted((folder / "ranks").glob("**/stderr.log")), folder / "train.log"):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f"training ended with status {status}: {said[-1]} (log: {log})"
    return f"training ended with status {status} and said nothing; its log is {folder / 'train.log'}"
