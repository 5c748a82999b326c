"""All benchmarks, one after the other, each in a process of its own.

    python -m tests.benchmarks                                              the bundled corpus and teacher
    python -m tests.benchmarks --corpus FOLDER --tokenizer FOLDER           .jsonl.zst sources of your own

Needs the project installed with its extra `test`; takes a quarter of an hour on two cores. The folders are for shards
and blocks alone. Where there is a GPU its suite runs too. Every table goes into tests/benchmarks/results/ under date
and hardware. Exit status 1 if one of them failed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from tests.benchmarks.results import CORPUS, REPO, RESULTS, TEACHER

NAMES = ("corpus", "loader", "step", "encodings", "rerun", "imports")


def main() -> int:
    """Runs them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of .jsonl.zst sources")
    parser.add_argument("--tokenizer", type=Path, default=TEACHER, help="folder of the tokenizer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables")
    given = parser.parse_args()
    results = ["--results", str(given.results.resolve())]
    extra = {"corpus": ["--corpus", str(given.corpus.resolve()), "--tokenizer", str(given.tokenizer.resolve())]}
    failed = []
    for name in (*NAMES, *(["gpu"] if torch.cuda.is_available() else [])):
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", *results, *extra.get(name, [])]
        if subprocess.run(command, cwd=REPO, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
