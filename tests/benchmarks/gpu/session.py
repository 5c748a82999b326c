"""Runs cases one after the other, each in a process of its own with a time limit, and writes one JSON line per case.

    lines = run_session(CASES, out=Path("build/gpu"), work=folder, seconds=520, device="cuda")

A case that fails, hangs or exhausts the memory costs only itself: its line says so and keeps the figures it had
recorded. `results.jsonl` gets every line at once, fsynced; `log.txt` gets the output of all cases.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.results import REPO

RESULTS_FILE = "results.jsonl"
LOG_FILE = "log.txt"
LEAST_SECONDS = 15.0
"""No case starts with less time left: importing torch and starting CUDA takes about as long."""
TINY_LIMIT_FACTOR = 4.0
"""A tiny session may run on a busy machine; nothing in it is measured."""
LOG_TAIL = 1500
"""Characters of the log that a failed case's line carries."""
KILL_SECONDS = 10.0
"""Wait for a killed process; one that hangs in the driver is left behind."""

DEFAULTS = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_LOGS": "recompiles,graph_breaks"}
"""Environment of a case, unless the user has set another value. The log then shows each recompilation."""


@dataclass(frozen=True)
class Folders:
    """`out`: files of the session. `work`: blocks, targets and compiled kernels that cases share."""

    out: Path
    work: Path


def run_session(cases: Sequence[Case], *, out: Path, work: Path, seconds: float, device: str) -> list[dict[str, Any]]:
    """Runs the cases in order until the time is up; returns the lines it wrote, one per case."""
    folders = Folders(out.resolve(), work.resolve())
    for folder in (folders.out, folders.work):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    lines = []
    for case in cases:
        left = deadline - time.monotonic()
        line = run_case(case, folders, device, left) if left >= LEAST_SECONDS else {"status": "skipped: no time left"}
        line = _described(case, device) | line
        _append(folders.out / RESULTS_FILE, line)
        print(f"{case.name}: {line['status']}, {line.get('seconds', 0.0):.0f} s", flush=True)
        lines.append(line)
    return lines


def run_case(case: Case, folders: Folders, device: str, left: float) -> dict[str, Any]:
    """Runs one case in a process group of its own; `left` seconds of the session remain."""
    limit = case.limit_seconds * (TINY_LIMIT_FACTOR if device == "cpu" else 1.0)
    partial = folders.work / f"{case.name}.partial.json"
    partial.unlink(missing_ok=True)
    start = time.monotonic()
    with (folders.out / LOG_FILE).open("ab") as log:
        log.write(f"\n==== {case.name}\n".encode())
        log.flush()
        offset = log.tell()
        status = _wait(_start(case, folders, device, partial, log), min(limit, left))
    results = json.loads(partial.read_bytes()) if partial.exists() else {}
    partial.unlink(missing_ok=True)
    if error := results.pop("error", None):
        status = f"failed: {error}"
    line = {"status": status, "seconds": time.monotonic() - start, "results": results}
    if status != "ok":
        line["log"] = _tail(folders.out / LOG_FILE, offset)
    return line


def _start(case: Case, folders: Folders, device: str, partial: Path, log: Any) -> subprocess.Popen[bytes]:
    job = {
        "target": case.target,
        "arguments": list(case.arguments),
        "device": device,
        "out": str(folders.out),
        "work": str(folders.work),
        "partial": str(partial),
    }
    environment = DEFAULTS | {"TORCHINDUCTOR_CACHE_DIR": str(folders.work / "inductor")} | os.environ
    paths = [str(REPO), *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.gpu.worker", json.dumps(job)],
        cwd=folders.out,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Status of a case: "ok", "failed: ..." or "timed out: ..."; ends its process group."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"timed out: {seconds:.0f} s"
    finally:
        _kill_group(process)
    return "ok" if code == 0 else f"failed: exit status {code}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the case and the processes it started (trainer, compile workers)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=KILL_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _described(case: Case, device: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    described: dict[str, Any] = {"case": case.name, "time": now, "device": device, "limit_seconds": case.limit_seconds}
    return described | ({"prediction": case.prediction.as_json()} if case.prediction else {})


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _tail(path: Path, offset: int) -> str:
    """The last characters that one case logged."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")[-LOG_TAIL:]
