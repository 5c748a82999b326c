"""Runs Prefect's process worker with an orderly stop: on SIGTERM it takes no more runs and lets running flows save.

    python -m flows.services.worker POOL [--with-healthcheck]

Prefect's own worker kills its flow processes when it is stopped: a training run would lose the steps since its last
checkpoint, and its state would stay Running. This worker first sends SIGTERM to each flow process, as Cancel does. The
flow stops its trainer, which writes a checkpoint, and reports Crashed; Retry resumes from the checkpoint. up.py and the
Docker image start this worker; the image's health check requests /health on PREFECT_WORKER_WEBSERVER_PORT.
"""

import asyncio
import signal
import sys
from abc import ABC
from contextlib import suppress

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessWorker

from flows.services.stale_runs import mark_stale_runs, worker_name

POLL_SECONDS = 0.2


class Worker(ProcessWorker, ABC):  # abstract, so that Prefect does not list it as a worker type
    """Takes runs of its pool until `stopping` is True."""

    stopping = False

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Takes and submits scheduled runs; Prefect calls it at every poll. Other runs stay in their queue."""
        return [] if self.stopping else await super().get_and_submit_flow_runs()


async def work(pool: str, with_healthcheck: bool = False) -> None:
    """Serves the pool until SIGTERM or SIGINT, then stops the flow processes and waits for their end."""
    worker = Worker(work_pool_name=pool, name=worker_name())
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    serving = asyncio.create_task(worker.start(with_healthcheck=with_healthcheck))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    worker.stopping = True
    await _stop_flows()
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def _stop_flows() -> None:
    """Sends SIGTERM to every flow process once and waits for all of them; the keeper sets the time limit."""
    signalled: set[int] = set()
    while children := psutil.Process().children():
        for child in children:
            if child.pid not in signalled:
                signalled.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.terminate()
        await asyncio.sleep(POLL_SECONDS)


def main(arguments: list[str]) -> None:
    """Serves the pool. First ends the stale runs of an earlier worker of this name, which would block their queue."""
    pool, *options = arguments
    with get_client(sync_client=True) as client:
        for run in mark_stale_runs(client):
            print(f"run {run.name} lost its process with an earlier worker and was marked {run.state}", flush=True)
    asyncio.run(work(pool, with_healthcheck="--with-healthcheck" in options))


if __name__ == "__main__":
    main(sys.argv[1:])
