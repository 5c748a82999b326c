"""A process that has imported all that a flow needs and runs one flow after the other in itself, as a process
that serves a deployment does.

    python -m tests.hard.soaker RECIPE.toml          started by soak.py; PREFECT_API_URL names the server

Reads lines, each the name of a flow, and answers each with {"state": ..., "message": ..., "seconds": ...} when that
flow has ended. What the flows say goes to standard error.
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
    """Until our own input ends."""
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
    """Frees what nothing refers to, and gives the kernel what the allocator holds of it: what stays is in use."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main(path: str) -> None:
    """Keeps our output for the answers: flows print tables."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    recipe = load_recipe(path)
    set_environment(recipe.home)
    serve(recipe, answers)


if __name__ == "__main__":
    main(sys.argv[1])
