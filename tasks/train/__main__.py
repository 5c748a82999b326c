"""The trainer's command line.

    python -m tasks.train RUN.json                            one process
    torchrun --nproc-per-node 2 -m tasks.train RUN.json       several ranks

Exit status: 0 the model is in the store, 143 stopped by SIGTERM after a checkpoint, 1 an error (one sentence on
stderr), 75 an error after which the same command may succeed, 2 wrong usage.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
from transformers.utils.logging import disable_progress_bar

from storage.errors import DistilError, RetryableError
from tasks.recipe.run_json import EXIT_RETRYABLE, RunSpec, read_run
from tasks.train.process import StopSignal, join_ranks, keep_freed_memory
from tasks.train.trainer import train

EXIT_STOPPED = 143
"""Exit status after SIGTERM: 128 + 15, as shells report it."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m tasks.train RUN.json", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    stop = StopSignal()
    signal.signal(signal.SIGTERM, stop.request)
    keep_freed_memory()
    try:
        run = read_run(arguments[0])
        return _train(run, stop)
    except DistilError as error:
        print(error, file=sys.stderr)
        return EXIT_RETRYABLE if isinstance(error, RetryableError) else 1


def _train(run: RunSpec, stop: StopSignal) -> int:
    try:
        finished = train(run, join_ranks(run), stop)
    except torch.OutOfMemoryError as error:
        rows = run.train.micro_rows or -(-run.train.batch_rows // int(os.environ.get("WORLD_SIZE", "1")))
        print(
            f"run {run.name}: the memory of the GPU is full with {rows} blocks of {run.blocks.length} tokens in one "
            "forward; lower train.micro_rows: a step stays as large, but is made in more, slower parts "
            f"({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    return 0 if finished else EXIT_STOPPED


def exit_with_status(run: Callable[[], int]) -> NoReturn:
    """Ends this process with the status that `run` returns, or with a traceback and status 1.

    With several ranks, no rank destroys its process group: gloo's destructor holds the interpreter lock while it waits
    for a thread that may need that lock (seen with torch 2.13), and the process would hang.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(run())
    status = 1
    try:
        status = run()
    except Exception:  # noqa: BLE001  as the interpreter handles it, but without the cleanup at exit
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_with_status(main)
