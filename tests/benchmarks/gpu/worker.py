"""Runs one case in this process and exits; tests/benchmarks/gpu/session.py starts it, one process per case.

    python -m tests.benchmarks.gpu.worker '{"target": "tests.benchmarks.gpu.hardware_cases:peak_rates", ...}'

The case's function is imported here, so that the session itself needs neither torch nor a CUDA context.
"""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from tests.benchmarks.gpu.context import Context
from tests.benchmarks.results import hardware


def run(job: dict[str, object]) -> int:
    """Runs the case that `job` names; returns the exit status."""
    partial = Path(str(job["partial"]))
    context = Context(str(job["device"]), Path(str(job["out"])), Path(str(job["work"])), partial)
    module, function = str(job["target"]).split(":")
    arguments = job["arguments"]
    assert isinstance(arguments, list)
    try:
        start = time.perf_counter()
        case = getattr(import_module(module), function)
        context.record("hardware", hardware(context.device))
        context.record("import_seconds", time.perf_counter() - start)
        case(context, *arguments)
        if not context.tiny:
            import torch

            context.record("peak_gb", torch.cuda.max_memory_allocated() / 1e9)
    except BaseException as error:  # noqa: BLE001  whatever ends the case belongs in its line
        traceback.print_exc()
        context.record("error", f"{type(error).__name__}: {str(error)[:300]}")
        return 1
    return 0


if __name__ == "__main__":
    status = run(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a library's thread that does not end must not cost a finished case its limit
