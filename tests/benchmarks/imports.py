"""Start-up time of `distil --help` and of the imports behind it.

    python -m tests.benchmarks.imports

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

Each row is a fresh interpreter, compared with one that imports nothing: CPU time, the best of several alternating
rounds. The ratio is the bare interpreter's time over ours; 1 would be an interpreter alone.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.benchmarks.results import REPO, RESULTS, Report, Row, facts_of, least_cpu, notes_of, publish

REPEATS = 5
COMMANDS = {
    "distil --help": ["-m", "flows.cli", "--help"],
    "distil demo --help": ["-m", "flows.cli", "demo", "--help"],
    "import tasks.recipe.config": ["-c", "import tasks.recipe.config"],
    "import tasks.corpus.shard, a worker process": ["-c", "import tasks.corpus.shard, tasks.tokens.blocks"],
    "import tasks.train.trainer, with torch and transformers": ["-c", "import tasks.train.trainer"],
    "import flows.distill, with Prefect": ["-c", "import flows.distill"],
}


def start(arguments: list[str]) -> None:
    """Runs one interpreter to its end."""
    subprocess.run([sys.executable, *arguments], cwd=REPO, stdout=subprocess.DEVNULL, check=True)


def measure(repeats: int = REPEATS) -> list[Row]:
    """Every command compared with a bare interpreter."""
    runs = [partial(start, ["-c", "pass"]), *(partial(start, arguments) for arguments in COMMANDS.values())]
    bare, *seconds = least_cpu(runs, repeats)
    return [Row(name, "CPU-s", spent, bare, bare / spent) for name, spent in zip(COMMANDS, seconds, strict=True)]


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    rows = measure()
    publish(
        Report("imports", "Start-up time", facts_of(python=sys.version.split()[0]), rows, notes_of(__doc__)),
        given.results,
    )


if __name__ == "__main__":
    main()
