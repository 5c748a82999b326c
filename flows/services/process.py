"""Servers of our own on this machine: started, waited for and stopped in one way.

    server = start("prefect", [sys.executable, "-m", "prefect", …], folder, environment, health=f"{url}/health")
    wait_until_up(server)
    stop(server)

Each runs under a keeper (keeper.py), in a session of its own: Ctrl-C is for whoever started it, and it ends, with all
its children, when that process ends, by whatever death. What it says is in FOLDER/NAME.log.
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
"""On two cores that also compute, starting takes up to half a minute."""

STOP_SECONDS = 15.0
"""Time that a server gets to close its connections."""


@dataclass(frozen=True)
class Service:
    """A running server: its name for people, its keeper, its log, the URL that answers once it is up ("": none)."""

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
    """Starts a command in `folder`, which also gets its log. `grace`: seconds between its SIGTERM and SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.services.keeper", str(os.getpid()), str(grace), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Prefect reads a project file in the working folder, MLflow writes there; this folder is safe ground.
            cwd=folder,
            env=with_repo_on_path(environment),
            start_new_session=True,
        )
    return Service(name, process, log, health, grace)


def with_repo_on_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this checkout first on the path of Python: a child needs no installed package of ours."""
    here = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(part for part in (here, environment.get("PYTHONPATH", "")) if part)
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
    """Waits for a command that ends by itself; the lines that it said. FatalError with the last if it failed."""
    try:
        status = service.process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise FatalError(f"{service.name} took longer than {seconds:g} seconds; see {service.log}") from error
    said = service.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status != 0:
        raise FatalError(f"{said[-1] if said else f'{service.name} ended with status {status}'} (log: {service.log})")
    return said


def stop(service: Service) -> None:
    """Ends a service and all its children: SIGTERM, and SIGKILL to what is left after its grace."""
    service.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        # Twice: the command has its grace, and then what it left behind.
        service.process.wait(2 * service.grace + STOP_SECONDS)
    service.process.kill()
    service.process.wait()


def is_healthy(url: str) -> bool:
    """True if the health page there says yes. Both servers show it to everybody, also with authentication on."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def free_port(name: str, given: int | None, usual: int = 0) -> int:
    """A port on loopback: the given one, else the usual one if it is free, else any. FatalError if `given` is taken."""
    for port in (usual, 0) if given is None else (given,):
        with socket.socket() as probe:
            # As servers do, so that the port of one that has just stopped counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    raise FatalError(f"port {given} is taken, so {name} cannot have it; choose another one")
