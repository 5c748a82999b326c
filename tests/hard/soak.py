"""Runs small flows for hours in one process against one Prefect server, and looks whether anything grows.

    python -m tests.hard.soak --runs 500 --minutes 60

Before each run the corpus loses its oldest source and gets a new one, so each run makes a source, shards, blocks and
targets and none has more to do than the one before; every tenth is the whole chain, with its trainer and MLflow. After
each run memory, open files, threads, children, temporary files and bytes of the databases are noted. What counts is the
growth a run (least squares) over the last two thirds, against the bounds of growth.py. At the end all rows of Prefect
are made 91 days old, and its own retention, as `distil up` sets it, must bring the database back to where it began.
"""

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow.tracking import MlflowClient

from flows.services.servers import RETENTION
from tests.hard.growth import BOUNDS, Sample, grown, growth, heading, line_of, verdict
from tests.hard.reliability import record
from tests.harness.place import Place, environment, make_place
from tests.harness.server import serving
from tests.harness.tiny import documents, make_teacher

SOURCES = 3
"""In the corpus at any time."""
TEXTS = 20
CHAIN_EVERY = 10
VACUUM_SECONDS = 5
RETENTION_SECONDS = 120.0
"""In which the retention must be through."""
OLD = "-91 days"
STAMPS = (("flow_run", "end_time"), ("events", "occurred"), ("event_resources", "occurred"))
"""Tables and columns by which Prefect's retention finds what is old."""


@dataclass
class Soak:
    """A server, a process that runs flows, and their folders."""

    place: Place
    corpus: Path
    temporary: Path
    process: "subprocess.Popen[str]"
    server: psutil.Process
    database: Path
    before: Mapping[str, int]
    used_before: float
    trainings: int = 0

    def run(self, number: int, flow: str) -> Sample:
        """Changes the corpus, runs the flow and measures what is left. RuntimeError if it does not complete."""
        renew(self.corpus, number + SOURCES)
        self.trainings += flow == "distill"
        assert self.process.stdin
        print(flow, file=self.process.stdin, flush=True)
        said = self.answer()
        if said["state"] != "COMPLETED":
            raise RuntimeError(f"run {number}, {flow}: {said['message']}; {self.log()}")
        return Sample(number, flow, said["seconds"], self.figures())

    def answer(self) -> dict[str, Any]:
        """The next line that the process says."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the flows ended: {self.log()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def log(self) -> str:
        """The end of what the flows said."""
        return (self.place.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def figures(self) -> dict[str, float]:
        """The current figures."""
        flows = psutil.Process(self.process.pid)
        wal = self.database.with_name(f"{self.database.name}-wal")
        return {
            "memory": flows.memory_info().rss / 1e6,
            "files": flows.num_fds(),
            "threads": flows.num_threads(),
            "children": len(flows.children(recursive=True)),
            "temporary": self._temporary(),
            "prefect": used_kilobytes(self.database),
            "wal": wal.stat().st_size / 1e3 if wal.exists() else 0.0,
            "mlflow": used_kilobytes(self.place.home / "mlflow" / "mlflow.db"),
            "server memory": self.server.memory_info().rss / 1e6,
            "server files": self.server.num_fds(),
            "server threads": self.server.num_threads(),
        }

    def _temporary(self) -> int:
        """Files and folders that should be gone, a folder for each training aside."""
        home = self.place.home
        scratch = [*self.temporary.rglob("*"), *(home / "store" / "scratch").rglob("*")]
        return len(scratch) + len(list((home / "run").glob("*"))) - self.trainings

    def retention(self) -> list[str]:
        """Makes all of Prefect's rows old until its retention is through; what it left there and should not have."""
        end = time.monotonic() + RETENTION_SECONDS
        # Again each time: Prefect writes the last events of a run up to five seconds after it.
        while (left := self._left()) and time.monotonic() < end:
            self._age()
            time.sleep(1)
        return left

    def _age(self) -> None:
        """Makes the rows old that are not yet."""
        with closing(sqlite3.connect(self.database, timeout=60)) as connection, connection:
            for table, column in STAMPS:
                connection.execute(
                    f"UPDATE {table} SET {column} = strftime('%Y-%m-%d %H:%M:%f', {column}, '{OLD}')"
                    f" WHERE {column} > datetime('now', '-1 day')"
                )

    def _left(self) -> list[str]:
        """Tables with more rows than at the beginning and a few names, and pages in use."""
        rows = {name: count - self.before.get(name, 0) for name, count in rows_of(self.database).items()}
        left = [f"{count} rows of {name}" for name, count in rows.items() if count > FEW]
        kilobytes = used_kilobytes(self.database) - self.used_before
        return left + ([f"{kilobytes:.0f} kB of pages in use"] if kilobytes > FEW_KILOBYTES else [])


FEW = 12
"""Rows that a table may keep for good, however many runs there were: names of flows, keys of artifacts."""
FEW_KILOBYTES = 400.0
"""Pages that are not empty again, for those rows and in each of some sixty tables and indexes."""


def renew(corpus: Path, number: int) -> None:
    """Source `number` comes, the oldest one goes."""
    corpus.mkdir(exist_ok=True)
    lines = [json.dumps({"content": text, "metadata": {}}) for text in documents(TEXTS, seed=number)]
    (corpus / f"fr_meta_part_{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (corpus / f"fr_meta_part_{number - SOURCES}.jsonl").unlink(missing_ok=True)


# ---- what is running -------------------------------------------------------------------------------------------


@contextmanager
def soaking(folder: Path) -> Iterator[Soak]:
    """Server, teacher, corpus and the process of the flows, which has imported all that it needs."""
    make_teacher(folder / "teacher")
    for number in range(1, SOURCES + 1):
        renew(folder / "corpus", number)
    place = small_place(folder)
    (folder / "tmp").mkdir()
    vacuum = {"PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": str(VACUUM_SECONDS)}
    vacuum["PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS"] = str(VACUUM_SECONDS)
    log = place.folder / "log"
    with serving(folder / "server", RETENTION | vacuum) as server, log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hard.soaker", str(place.recipe)],
            cwd=folder,
            env=environment(place.folder, server.url) | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
        try:
            database = server.folder / "prefect.db"
            assert server.process
            parent = psutil.Process(server.process.pid)
            used = used_kilobytes(database)
            made = Soak(place, folder / "corpus", folder / "tmp", process, parent, database, rows_of(database), used)
            made.answer()
            yield made
        finally:
            process.kill()
            process.communicate()


def small_place(folder: Path) -> Place:
    """A place with few steps and an empty database of MLflow, which takes seconds to make."""
    train = {"max_steps": 4, "validate_steps": 4}
    place = make_place(folder / "place", folder / "corpus", folder / "teacher", train=train, run={"workers": 1})
    (place.home / "mlflow").mkdir(parents=True)
    MlflowClient(place.mlflow).search_experiments()
    return place


def used_kilobytes(database: Path) -> float:
    """Size of the pages in use: SQLite keeps the file and reuses empty pages."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        count, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return float((count - free) * size) / 1e3


def rows_of(database: Path) -> dict[str, int]:
    """How many rows each table has."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


# ---- the runs --------------------------------------------------------------------------------------------------


def soak(made: Soak, runs: int, seconds: float = float("inf")) -> Iterator[Sample]:
    """Samples, as long as there is time. Before the first that counts, a chain and a corpus: they import, connect and
    fill what is kept once."""
    end = time.monotonic() + seconds
    made.run(-1, "distill")
    made.run(0, "prepare")
    for number in range(1, runs + 1):
        if time.monotonic() < end:
            yield made.run(number, "prepare" if number % CHAIN_EVERY else "distill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line every ten runs, then the verdict; 1 if anything grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--every", type=int, default=10, help="runs per printed line")
    given = parser.parse_args(arguments)
    samples = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, soaking(Path(folder)) as made:
        print(heading(), flush=True)
        for sample in soak(made, given.runs, given.minutes * 60):
            samples.append(sample)
            if sample.number % given.every == 0:
                print(line_of(sample), flush=True)
        left = made.retention()
    print(f"{len(samples)} runs\n{verdict(samples)}")
    slopes = {name: growth([one.figures[name] for one in samples]) for name in ("memory", "server memory", "prefect")}
    per_run = ", ".join(f"{value:+.2f} {BOUNDS[name].unit} {name}" for name, value in slopes.items())
    other = ", ".join(grown(samples)) or "nothing"
    record("tests.hard.soak", f"{len(samples)} runs; per run {per_run}; above its bound: {other}")
    print(f"after retention: {', '.join(left) if left else 'as at the beginning'}")
    return int(bool(left or grown(samples)))


if __name__ == "__main__":
    sys.exit(main())
