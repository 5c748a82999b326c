"""Starts and stops the servers and workers of this machine, and waits for them.

    server = start("prefect", [sys.executable, "-m", "prefect", ...], folder, environment, health=f"{url}/health")
    wait_until_up(server)
    stop(server)

Each service runs under a keeper (keeper.py) in its own session, so Ctrl-C reaches only the process that started it.
tasks/parent_death.py lists how a service ends when that process dies. Its output is written to FOLDER/NAME.log.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flows.home import LOOPBACK
from storage.errors import FatalError

START_SECONDS = 180.0
"""Time limit in seconds for the start of a server. On two busy cores a start takes up to 30 s."""

STOP_SECONDS = 15.0
"""Time in seconds that a server gets to close its connections."""


@dataclass(frozen=True)
class Service:
    """A running service: its name, its keeper, its log file, its health page or "", and its grace period in seconds."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    health: str
    grace: float


def start(
    name: str,
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    health: str = "",
    grace: float = STOP_SECONDS,
) -> Service:
    """Starts a command in `folder` and writes its log there. `grace` is the time in seconds from SIGTERM to SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.services.keeper", str(os.getpid()), str(grace), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Not the user's working folder: Prefect reads a project file from it, and MLflow writes to it.
            cwd=folder,
            env=with_repo_on_path(environment),
            start_new_session=True,
        )
    return Service(name, process, log, health, grace)


def with_repo_on_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with this checkout first in PYTHONPATH, so that child processes import the same code."""
    checkout = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(part for part in (checkout, environment.get("PYTHONPATH", "")) if part)
    return dict(environment) | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}


def wait_until_up(service: Service) -> None:
    """Waits until the server responds. FatalError if it ends, or does not respond within START_SECONDS."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and service.process.poll() is None:
        if is_healthy(service.health):
            return
        time.sleep(0.1)
    raise FatalError(f"{service.name} did not start; see {service.log}", str(service.log))


def finish(service: Service, seconds: float) -> list[str]:
    """Waits for the end of a command and returns its lines of output. FatalError with the last line if it failed."""
    try:
        status = service.process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise FatalError(f"{service.name} took longer than {seconds:g} seconds; see {service.log}") from error
    output = service.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status != 0:
        reason = output[-1] if output else f"{service.name} ended with status {status}"
        raise FatalError(f"{reason} (log: {service.log})")
    return output


def stop(service: Service) -> None:
    """Ends a service and all its descendants: SIGTERM, then SIGKILL after `grace` seconds."""
    service.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        # Twice: first the command has a grace period, then the processes that it left over.
        service.process.wait(2 * service.grace + STOP_SECONDS)
    service.process.kill()
    service.process.wait()


def is_healthy(url: str) -> bool:
    """Returns True if the health page responds with status 200. Both servers serve it without authentication."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def free_port(name: str, given: int | None, usual: int = 0) -> int:
    """Returns a free port on loopback: `given` if set, else `usual` if it is free, else any.

    FatalError with the name of the server if `given` is taken.
    """
    for port in (usual, 0) if given is None else (given,):
        with socket.socket() as probe:
            # Servers set this option too: the port of a server that has just stopped counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    raise FatalError(f"{name} cannot use port {given} because it is taken; choose a different port")
