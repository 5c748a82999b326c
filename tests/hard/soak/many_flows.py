"""Imports the modules of the flows once and runs many flows in one process, like a process that serves a deployment.

    python -m tests.hard.soak.many_flows RECIPE.toml          started by soak.py; uses the server at PREFECT_API_URL

Reads lines, each the name of a flow, and responds to each with {"state": ..., "message": ..., "seconds": ...} when the
flow has ended. The output of the flows is written to standard error.
"""

import ctypes
import gc
import json
import os
import sys
import time
from typing import TextIO

from flows.home import set_environment
from tasks.recipe.config import Recipe
from tasks.recipe.load import load_recipe


def serve(recipe: Recipe, answers: TextIO) -> None:
    """Runs flows until standard input ends."""
    # Deferred: Prefect reads the environment when it is imported.
    import mlflow.transformers  # noqa: F401
    import transformers.pipelines  # noqa: F401

    from flows.distill import distill
    from flows.prepare import prepare

    known = {"prepare": prepare, "distill": distill}
    print(json.dumps({"state": "READY"}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.monotonic()
        state = known[line.strip()](recipe, return_state=True)
        seconds = time.monotonic() - start
        give_back()
        answer = {"state": state.type.value, "message": state.message, "seconds": seconds}
        del state
        print(json.dumps(answer), file=answers, flush=True)


def give_back() -> None:
    """Frees unreferenced objects and returns the allocator's free memory to the kernel, so that only leaks remain."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main(path: str) -> None:
    """Redirects standard output to standard error, since flows print tables; only responses use the original output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    recipe = load_recipe(path)
    set_environment(recipe.home)
    serve(recipe, answers)


if __name__ == "__main__":
    main(sys.argv[1])
