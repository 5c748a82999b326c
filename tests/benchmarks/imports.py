"""How long `distil --help` takes, and the imports behind it.

    python -m tests.benchmarks.imports

Needs the project installed. Prints a table and writes it into tests/benchmarks/results/.

Each line is a fresh interpreter, beside one that imports nothing; CPU time, the best of several in turn. The ratio is
theirs over ours: 1 would be an interpreter alone.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.benchmarks.results import REPO, RESULTS, Report, Row, facts_of, least_cpu, notes_of, publish

TRIES = 5
COMMANDS = {
    "distil --help": ["-m", "flows.cli", "--help"],
    "distil demo --help": ["-m", "flows.cli", "demo", "--help"],
    "import tasks.recipe.config": ["-c", "import tasks.recipe.config"],
    "import tasks.corpus.shard, a worker process": ["-c", "import tasks.corpus.shard, tasks.tokens.blocks"],
    "import tasks.train, torch and transformers": ["-c", "import tasks.train"],
    "import flows.distill, with Prefect": ["-c", "import flows.distill"],
}


def start(arguments: list[str]) -> None:
    """One interpreter, to its end."""
    subprocess.run([sys.executable, *arguments], cwd=REPO, stdout=subprocess.DEVNULL, check=True)


def measure(tries: int = TRIES) -> list[Row]:
    """All commands beside a bare interpreter."""
    works = [partial(start, ["-c", "pass"]), *(partial(start, arguments) for arguments in COMMANDS.values())]
    bare, *seconds = least_cpu(works, tries)
    return [Row(name, "CPU-s", spent, bare, bare / spent) for name, spent in zip(COMMANDS, seconds, strict=True)]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    rows = measure()
    publish(
        Report("imports", "Time to start", facts_of(python=sys.version.split()[0]), rows, notes_of(__doc__)),
        given.results,
    )


if __name__ == "__main__":
    main()
