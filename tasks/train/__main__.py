"""Trains the run of a run file, from the command line.

    python -m tasks.train RUN.json                            one process
    torchrun --nproc-per-node 2 -m tasks.train RUN.json       several ranks

Exit status: 0 if the model is in the store, 143 if SIGTERM stopped the trainer after a checkpoint, 1 after an error
(one sentence on stderr), 75 after an error if the same command may succeed later, 2 after wrong usage.
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
    """Trains one run and returns the exit status."""
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
            f"run {run.name}: {rows} blocks of {run.blocks.length} tokens in one forward pass exceed the memory of the "
            "GPU; lower train.micro_rows, which splits a step into more micro-batches and does not change its size "
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
    except Exception:  # noqa: BLE001  as the interpreter does, but without its cleanup at exit
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_with_status(main)
