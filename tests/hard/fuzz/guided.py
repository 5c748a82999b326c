"""Runs coverage-guided fuzzing of the targets in targets.py, and prints the number of executions of each.

    python -m tests.hard.fuzz.guided --seconds 60 [TARGET ...]         requires the extra `fuzz` (atheris)

Each target runs in a separate process, since libFuzzer ends its process. The exit status is 1 if a target has a
finding; its input is saved in the current folder as crash-….
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ONE = "--inside"
"""Command-line option that marks the process of one target."""


def fuzz(target: str, seconds: int) -> tuple[int, int]:
    """Fuzzes one target in a separate process. Returns its exit status and libFuzzer's number of executions."""
    command = [sys.executable, "-m", "tests.hard.fuzz.guided", ONE, target, str(seconds)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    counts = re.findall(r"^#(\d+)|number_of_executed_units: (\d+)", done.stderr, re.MULTILINE)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return done.returncode, max((int(first or second) for first, second in counts), default=0)


def inside(target: str, seconds: int) -> None:
    """Fuzzes one target in this process for `seconds`; never returns."""
    import atheris

    # Only the project's packages: instrumenting torch and transformers takes minutes and does not guide the fuzzer.
    with atheris.instrument_imports(include=["storage", "tasks"]):
        from tests.hard.fuzz.targets import attempt, seeds

    with tempfile.TemporaryDirectory() as place:
        folder, known = Path(place) / "work", Path(place) / "known"
        folder.mkdir()
        known.mkdir()
        for number, data in enumerate(seeds(target)):
            (known / str(number)).write_bytes(data)
        options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(known)], lambda data: attempt(target, data, folder))
        atheris.Fuzz()


def main() -> None:
    """Fuzzes the targets named on the command line, by default all; exits with status 1 if any has a finding."""
    if sys.argv[1:2] == [ONE]:
        inside(sys.argv[2], int(sys.argv[3]))
        return
    # Deferred: the process of a target imports these modules with instrumentation.
    from tests.hard.fuzz.targets import TARGETS
    from tests.hard.reliability import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--seconds", type=int, default=60, help="seconds per target")
    given = parser.parse_args()
    unknown = set(given.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; use any of {', '.join(TARGETS)}")
    executions: list[str] = []
    findings = 0
    for target in given.targets or TARGETS:
        status, count = fuzz(target, given.seconds)
        print(f"{target:<10} {count:>12,} executions{'' if status == 0 else ', FINDING'}", flush=True)
        executions.append(f"{count:,} of {target}")
        findings += status != 0
    record("tests.hard.fuzz.guided", f"executions: {', '.join(executions)}; findings: {findings}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
