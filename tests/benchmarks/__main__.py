"""Runs all benchmarks one after the other, each in a process of its own.

    python -m tests.benchmarks                                              the bundled corpus and teacher
    python -m tests.benchmarks --corpus FOLDER --tokenizer FOLDER           .jsonl.zst sources of your own

Needs the project installed with its extra `test`; takes a quarter of an hour on two cores. The corpus and tokenizer
folders are used by the benchmark of shards and blocks only. On a machine with a GPU a session of tests.benchmarks.gpu
follows. Tables are written into tests/benchmarks/results/, named by date and hardware. Exit status 1 if a benchmark
failed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.results import CORPUS, REPO, RESULTS, TEACHER

NAMES = ("corpus", "loader", "step", "encodings", "rerun", "imports")
GPU_SECONDS = 1500
"""Time of the GPU session: enough for every case."""


def main() -> int:
    """Runs every benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of .jsonl.zst sources")
    parser.add_argument("--tokenizer", type=Path, default=TEACHER, help="folder of the tokenizer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables")
    given = parser.parse_args()
    results = ["--results", str(given.results.resolve())]
    extra = {"corpus": ["--corpus", str(given.corpus.resolve()), "--tokenizer", str(given.tokenizer.resolve())]}
    failed = [name for name in NAMES if not succeeds(name, *results, *extra.get(name, []))]
    if torch.cuda.is_available() and not gpu_session_succeeds(results):
        failed.append("gpu")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def gpu_session_succeeds(results: list[str]) -> bool:
    """Runs a GPU session and publishes its table, also where a case failed."""
    with tempfile.TemporaryDirectory() as folder:
        complete = succeeds("gpu", "--out", folder, "--seconds", str(GPU_SECONDS))
        return succeeds("gpu", "--publish", folder, *results) and complete


def succeeds(name: str, *arguments: str) -> bool:
    """Whether a benchmark ends with status 0."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=REPO, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
