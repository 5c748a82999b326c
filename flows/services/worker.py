"""Prefect's process worker, with a good end: told to stop, it takes no more runs and lets those in flight save.

    python -m flows.services.worker POOL [--with-healthcheck]

Prefect's own kills its flow processes at once when it is told to stop: a training would lose what it did since its
last checkpoint, and the run would stay Running. Here each gets SIGTERM first, as from Cancel: the flow stops its
trainer, which writes a checkpoint, and reports itself Crashed, so that Retry goes on from there. Started by up.py and
by the image, which asks /health on Prefect's port for workers (PREFECT_WORKER_WEBSERVER_PORT) whether it still polls.
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


class Worker(ProcessWorker, ABC):  # Prefect's list of worker types leaves out abstract classes, and this is no type
    """Takes runs until `stopping` is set."""

    stopping = False

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Called again and again; what it leaves alone stays in its queue."""
        return [] if self.stopping else await super().get_and_submit_flow_runs()


async def work(pool: str, with_healthcheck: bool = False) -> None:
    """Serves the pool until SIGTERM or SIGINT, and then until the last flow process has ended."""
    worker = Worker(work_pool_name=pool, name=worker_name())
    told = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, told.set)
    serving = asyncio.create_task(worker.start(with_healthcheck=with_healthcheck))
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    worker.stopping = True
    await _stop_flows()
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def _stop_flows() -> None:
    """Sends SIGTERM to every flow process once and waits for all of them; who started us sets the limit."""
    asked: set[int] = set()
    while children := psutil.Process().children():
        for child in children:
            if child.pid not in asked:
                asked.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.terminate()
        await asyncio.sleep(POLL_SECONDS)


def main(arguments: list[str]) -> None:
    """Marks what an earlier worker of this name left behind, so that it blocks no queue, and serves the pool."""
    pool, *options = arguments
    with get_client(sync_client=True) as client:
        for run in mark_stale_runs(client):
            print(f"{run.name}: left behind, now {run.state}", flush=True)
    asyncio.run(work(pool, with_healthcheck="--with-healthcheck" in options))


if __name__ == "__main__":
    main(sys.argv[1:])
