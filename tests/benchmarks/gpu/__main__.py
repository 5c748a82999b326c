"""Measures one GPU in a session of limited time: capture, training, loss kernels and the reference's step.

    python -m tests.benchmarks.gpu --out FOLDER --seconds 520           all cases in order of worth
    python -m tests.benchmarks.gpu --cases loss train-cached-masked-256
    python -m tests.benchmarks.gpu --tiny                               on a CPU: shows that every case runs
    python -m tests.benchmarks.gpu --publish FOLDER                     lines of a session to a table in results/
    python -m tests.benchmarks.gpu --list

Needs the trainer's packages (torch, transformers, pyarrow, numpy, safetensors, tokenizers, pydantic, fsspec, orjson),
this checkout and 10 GB of disk for `--work`; on a bare machine put it on PYTHONPATH, nothing is installed. FOLDER gets
results.jsonl (one line per case, also for failed cases and those out of time), log.txt and profile.txt.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.benchmarks.gpu.cases import CASES, Case
from tests.benchmarks.gpu.report import publish_sessions
from tests.benchmarks.gpu.session import run_session
from tests.benchmarks.results import RESULTS

GPU_SECONDS, TINY_SECONDS = 520.0, 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a session, or publishes earlier ones; returns the exit status: 1 where a case did not end well."""
    given = make_parser().parse_args(arguments)
    if given.list:
        for case in CASES.values():
            print(f"{case.name:26} {case.limit_seconds:4.0f} s  {case.purpose}")
        return 0
    if given.publish:
        publish_sessions(given.publish, given.results)
        return 0
    cases = select_cases(given.cases)
    seconds = given.seconds or (TINY_SECONDS if given.tiny else GPU_SECONDS)
    device = "cpu" if given.tiny else "cuda"
    with tempfile.TemporaryDirectory(prefix="gpu-session-", ignore_cleanup_errors=True) as temporary:
        work = given.work or Path(temporary)
        lines = run_session(cases, out=given.out, work=work, seconds=seconds, device=device)
    return 0 if all(line["status"] == "ok" for line in lines) else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, help=f"time for the session ({GPU_SECONDS:.0f}; tiny: {TINY_SECONDS:.0f})"
    )
    parser.add_argument("--cases", "--only", nargs="+", choices=CASES, metavar="NAME", help="only these, in this order")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: measures nothing")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the session's files")
    parser.add_argument("--work", type=Path, help="folder for blocks and targets (default: temporary)")
    parser.add_argument("--publish", type=Path, nargs="+", metavar="FOLDER", help="tabulate earlier sessions, run none")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table of --publish")
    parser.add_argument("--list", action="store_true", help="print cases, limits and purposes")
    return parser


def select_cases(names: Sequence[str] | None) -> list[Case]:
    """The named cases in the order given; all of them without names."""
    return [CASES[name] for name in names or CASES]


def _exit(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit)  # on the way out the case in progress and the work folder are removed
    sys.exit(main())
