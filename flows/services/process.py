"""Starts, awaits and stops the servers and workers of this machine.

    server = start("prefect", [sys.executable, "-m", "prefect", ...], folder, environment, health=f"{url}/health")
    wait_until_up(server)
    stop(server)

Each runs under a keeper (keeper.py) in a session of its own, so Ctrl-C reaches only the process that started it;
tasks/parent_death.py lists how it ends when that process dies. Its output is in FOLDER/NAME.log.
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
"""Time limit of a start. On two busy cores a start takes up to 30 s."""

STOP_SECONDS = 15.0
"""Time that a server gets to close its connections."""


@dataclass(frozen=True)
class Service:
    """A running service: its name, its keeper's process, its log, its health page ("": none), its grace in seconds."""

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
    """Starts a command in `folder`, with its log there. `grace`: seconds between SIGTERM and SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.services.keeper", str(os.getpid()), str(grace), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Prefect reads a project file from the working folder and MLflow writes into it, so not the user's.
            cwd=folder,
            env=with_repo_on_path(environment),
            start_new_session=True,
        )
    return Service(name, process, log, health, grace)


def with_repo_on_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this checkout first in PYTHONPATH, so that a child process imports the same code."""
    checkout = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(part for part in (checkout, environment.get("PYTHONPATH", "")) if part)
    return dict(environment) | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}


def wait_until_up(service: Service) -> None:
    """Returns when the server answers. FatalError if it ends or takes too long."""
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
        # Twice: first the command has its grace period, then the processes that it left.
        service.process.wait(2 * service.grace + STOP_SECONDS)
    service.process.kill()
    service.process.wait()


def is_healthy(url: str) -> bool:
    """True if the health page answers 200. Both servers show it without authentication."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def free_port(name: str, given: int | None, usual: int = 0) -> int:
    """A free port on loopback: `given`; without it `usual`, or any if that is taken. FatalError if `given` is taken."""
    for port in (usual, 0) if given is None else (given,):
        with socket.socket() as probe:
            # As servers do: the port of a server that has just stopped counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    raise FatalError(f"port {given} is taken, so {name} cannot have it; choose another one")
