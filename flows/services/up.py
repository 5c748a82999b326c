"""Implements `distil up`: runs a Prefect server, an MLflow server and a worker with all deployments until Ctrl-C.

    serve(recipes, port=None, mlflow_port=None)

Each service is a process under a keeper (process.py), which ends it with this process. All state is stored below `home`
and reused at the next start.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flows.home import LOOPBACK, set_environment, up_file, without_credentials
from flows.services.auth import check_mlflow
from flows.services.process import STOP_SECONDS, Service, finish, free_port, start, stop, wait_until_up
from flows.services.servers import MLFLOW_PORT, PREFECT_PORT, mlflow_server, prefect_server, verbose_environment
from storage.errors import FatalError
from storage.files.lock import try_acquire
from tasks.recipe.config import Recipe

POOL = "distil"

WORKER_SECONDS = 90.0
"""Grace period of the worker in seconds: task_policy.GRACE_SECONDS for the trainer's checkpoint, and 30 s for the flows
to report their end. (Not imported, since task_policy.py imports Prefect, which takes seconds and memory.)"""

REGISTER_SECONDS = 600.0
"""Time limit in seconds for the registration of all deployments."""

POLL_SECONDS = 0.5


class StopRequested(BaseException):
    """Raised on Ctrl-C or SIGTERM. A BaseException, so that `except Exception` does not catch it."""


def serve(recipes: Sequence[Recipe], port: int | None = None, mlflow_port: int | None = None) -> None:
    """Serves the home of these recipes until SIGINT or SIGTERM.

    FatalError if the recipes have different homes, another `distil up` serves this home, a port is taken, or a service
    does not start or ends unexpectedly.
    """
    home = _home_of(recipes)
    services: list[Service] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _raise_stop_requested)
    with _alone(home):
        try:
            _run(services, recipes, home, _addresses(port, mlflow_port))
        except StopRequested:
            print("stopping all services; a training run first writes a checkpoint", flush=True)
        finally:
            _stop(services, home)
    print("all services stopped")


def _home_of(recipes: Sequence[Recipe]) -> str:
    homes = sorted({recipe.home for recipe in recipes})
    if len(homes) > 1:
        raise FatalError(f"these recipes have different homes ({', '.join(homes)}); select one with --home")
    return homes[0]


def _raise_stop_requested(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise StopRequested


@contextmanager
def _alone(home: str) -> Iterator[None]:
    """Holds the lock of this home; the kernel releases it when this process ends."""
    lock = try_acquire(up_file(home).with_name("up.lock"))
    if lock is None:
        raise FatalError(f"another `distil up` serves {home}; stop it, or select a different home with --home")
    with lock:
        yield


def _addresses(port: int | None, mlflow_port: int | None) -> dict[str, str]:
    """Returns the addresses for clients, as written to up.json."""
    if port is not None and port == mlflow_port:
        raise FatalError(f"Prefect and MLflow cannot both use port {port}; set --port and --mlflow-port to two ports")
    prefect = f"http://{LOOPBACK}:{free_port('Prefect', port, PREFECT_PORT)}"
    mlflow = f"http://{LOOPBACK}:{free_port('MLflow', mlflow_port, MLFLOW_PORT)}"
    return {"prefect_api": f"{prefect}/api", "prefect_ui": prefect, "mlflow": mlflow}


def _run(services: list[Service], recipes: Sequence[Recipe], home: str, addresses: dict[str, str]) -> None:
    """Starts all services, appends them to `services`, and watches them."""
    given = os.environ.get("MLFLOW_TRACKING_URI", addresses["mlflow"])
    if given.rstrip("/") != addresses["mlflow"]:
        raise FatalError(
            f"MLFLOW_TRACKING_URI is {without_credentials(given)}, but `distil up` starts its own MLflow server; unset "
            "the variable, or, to use that server, run `prefect server start`, `distil deploy` and a worker instead"
        )
    _set_environment(home, addresses)
    print(f"starting Prefect and MLflow for {home}", flush=True)
    services.append(mlflow_server(home, _port(addresses["mlflow"])))
    services.append(prefect_server(home, _port(addresses["prefect_ui"])))
    services.append(_service("register_deployments", home, _recipes_file(recipes, home), POOL))
    mlflow, prefect, register = services
    wait_until_up(prefect)
    for line in finish(register, REGISTER_SECONDS):
        print(line)
    wait_until_up(mlflow)
    check_mlflow(addresses["mlflow"], home)
    services[-1] = _service("worker", home, POOL, grace=WORKER_SECONDS)
    _write(home, addresses)
    print(f"Prefect  {addresses['prefect_ui']}\nMLflow   {addresses['mlflow']}")
    print("logs     " + "  ".join(str(service.log) for service in services))
    print("press Ctrl-C to stop all services", flush=True)
    _watch(services)


def _service(name: str, home: str, *arguments: str, grace: float = STOP_SECONDS) -> Service:
    """Starts the module `name` of flows/services as a process."""
    command = [sys.executable, "-m", f"flows.services.{name}", *arguments]
    return start(name, command, Path(home) / "run", verbose_environment(os.environ), grace=grace)


def _recipes_file(recipes: Sequence[Recipe], home: str) -> str:
    """Writes the recipes to a file for register_deployments.py, and returns its path."""
    path = Path(home) / "run" / "recipes.json"
    values = [recipe.model_dump(mode="json", by_alias=True) for recipe in recipes]
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def _set_environment(home: str, addresses: dict[str, str]) -> None:
    """Sets the environment of this process and its children. PREFECT_HOME is always in `home`."""
    os.environ.pop("PREFECT_API_URL", None)
    set_environment(home)
    os.environ["PREFECT_API_URL"] = addresses["prefect_api"]
    os.environ["PREFECT_UI_URL"] = addresses["prefect_ui"]
    os.environ["MLFLOW_TRACKING_URI"] = addresses["mlflow"]
    # In seconds, the shortest that Prefect allows. An automation marks runs whose heartbeats stop.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # In seconds: the longest delay before a run that was requested in the browser starts.
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "3")


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _write(home: str, addresses: dict[str, str]) -> None:
    """Writes up.json, from which other commands read the addresses. The file is replaced atomically."""
    path = up_file(home)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"pid": os.getpid(), **addresses}), encoding="utf-8")
    fresh.replace(path)


def _watch(services: Sequence[Service]) -> None:
    """Watches the services and never returns. FatalError when one of them ends."""
    while True:
        for service in services:
            status = service.process.poll()
            if status is not None:
                raise FatalError(
                    f"{service.name} ended with status {status}, so all services were stopped; see {service.log}",
                    str(service.log),
                )
        time.sleep(POLL_SECONDS)


def _stop(services: Sequence[Service], home: str) -> None:
    """Stops all services in reverse order: the worker first, since its flows report their end to the servers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    up_file(home).unlink(missing_ok=True)
    for service in reversed(services):
        stop(service)
