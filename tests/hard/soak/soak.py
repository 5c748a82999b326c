"""Runs small flows for hours in one process against one Prefect server, and measures the growth of its resources.

    python -m tests.hard.soak.soak --runs 500 --minutes 60

Before each run, a new source replaces the oldest source of the corpus, so each run makes one source with its shards,
blocks and targets, and all runs have the same amount of work; every tenth run is the complete pipeline, with its
trainer and MLflow. After each run, memory, open files, threads, child processes, temporary files and database sizes are
measured. Their growth per run (least squares) over the last two thirds must be within the bounds of growth.py. At the
end, all rows of Prefect's database are made 91 days old; Prefect's retention, with the settings of `distil up`, must
then reduce the database to its initial size.
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
from tests.hard.reliability import record
from tests.hard.soak.growth import BOUNDS, Sample, grown, growth, heading, line_of, verdict
from tests.harness.project import Project, environment, make_project
from tests.harness.servers.prefect_server import serving
from tests.harness.tiny import documents, make_teacher

SOURCES = 3
"""Number of sources in the corpus at any time."""
TEXTS = 20
CHAIN_EVERY = 10
VACUUM_SECONDS = 5
RETENTION_SECONDS = 120.0
"""Time within which the retention must have deleted all old rows."""
OLD = "-91 days"
STAMPS = (("flow_run", "end_time"), ("events", "occurred"), ("event_resources", "occurred"))
"""Tables and columns by which Prefect's retention selects old rows."""


@dataclass
class Soak:
    """A server, a process that runs flows, their folders, and the initial size of the server's database."""

    project: Project
    corpus: Path
    temporary: Path
    process: "subprocess.Popen[str]"
    server: psutil.Process
    database: Path
    before: Mapping[str, int]
    used_before: float
    trainings: int = 0

    def run(self, number: int, flow: str) -> Sample:
        """Changes the corpus, runs the flow and measures the resources. RuntimeError if the flow does not complete."""
        renew(self.corpus, number + SOURCES)
        self.trainings += flow == "distill"
        assert self.process.stdin
        print(flow, file=self.process.stdin, flush=True)
        said = self.answer()
        if said["state"] != "COMPLETED":
            raise RuntimeError(f"run {number}, {flow}: {said['message']}; {self.log()}")
        return Sample(number, flow, said["seconds"], self.figures())

    def answer(self) -> dict[str, Any]:
        """Returns the next response of the flow process."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process tests.hard.soak.many_flows ended: {self.log()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def log(self) -> str:
        """Returns the last 3,000 characters of the flows' output."""
        return (self.project.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def figures(self) -> dict[str, float]:
        """Returns the current measurements, by the names of BOUNDS."""
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
            "mlflow": used_kilobytes(self.project.home / "mlflow" / "mlflow.db"),
            "server memory": self.server.memory_info().rss / 1e6,
            "server files": self.server.num_fds(),
            "server threads": self.server.num_threads(),
        }

    def _temporary(self) -> int:
        """Counts temporary files and run folders, except one folder per training run."""
        home = self.project.home
        scratch = [*self.temporary.rglob("*"), *(home / "store" / "scratch").rglob("*")]
        return len(scratch) + len(list((home / "run").glob("*"))) - self.trainings

    def retention(self) -> list[str]:
        """Makes all rows of Prefect's database old until its retention has deleted them. Returns the remaining ones."""
        end = time.monotonic() + RETENTION_SECONDS
        # Repeatedly, because Prefect writes the last events of a run up to five seconds after the run.
        while (left := self._left()) and time.monotonic() < end:
            self._age()
            time.sleep(1)
        return left

    def _age(self) -> None:
        """Makes all recent rows old."""
        with closing(sqlite3.connect(self.database, timeout=60)) as connection, connection:
            for table, column in STAMPS:
                connection.execute(
                    f"UPDATE {table} SET {column} = strftime('%Y-%m-%d %H:%M:%f', {column}, '{OLD}')"
                    f" WHERE {column} > datetime('now', '-1 day')"
                )

    def _left(self) -> list[str]:
        """Returns the tables with more than FEW new rows, and the pages in use beyond FEW_KILOBYTES, as text."""
        rows = {name: count - self.before.get(name, 0) for name, count in rows_of(self.database).items()}
        left = [f"{count} rows of {name}" for name, count in rows.items() if count > FEW]
        kilobytes = used_kilobytes(self.database) - self.used_before
        return left + ([f"{kilobytes:.0f} kB of pages in use"] if kilobytes > FEW_KILOBYTES else [])


FEW = 12
"""Rows that a table may keep permanently, for any number of runs: names of flows, keys of artifacts."""
FEW_KILOBYTES = 400.0
"""Size of the pages that may stay in use, for those rows and in each of about sixty tables and indexes."""


def renew(corpus: Path, number: int) -> None:
    """Adds source `number` to the corpus and removes the oldest source."""
    corpus.mkdir(exist_ok=True)
    lines = [json.dumps({"content": text, "metadata": {}}) for text in documents(TEXTS, seed=number)]
    (corpus / f"fr_meta_part_{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (corpus / f"fr_meta_part_{number - SOURCES}.jsonl").unlink(missing_ok=True)


# ---- what is running -------------------------------------------------------------------------------------------


@contextmanager
def soaking(folder: Path) -> Iterator[Soak]:
    """Provides server, teacher, corpus and the process that runs the flows, after its imports."""
    make_teacher(folder / "teacher")
    for number in range(1, SOURCES + 1):
        renew(folder / "corpus", number)
    project = small_project(folder)
    (folder / "tmp").mkdir()
    vacuum = {"PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": str(VACUUM_SECONDS)}
    vacuum["PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS"] = str(VACUUM_SECONDS)
    log = project.folder / "log"
    with serving(folder / "server", RETENTION | vacuum) as server, log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hard.soak.many_flows", str(project.recipe)],
            cwd=folder,
            env=environment(project.folder, server.url) | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
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
            made = Soak(project, folder / "corpus", folder / "tmp", process, parent, database, rows_of(database), used)
            made.answer()
            yield made
        finally:
            process.kill()
            process.communicate()


def small_project(folder: Path) -> Project:
    """Makes a project with few training steps and an empty MLflow database."""
    train = {"max_steps": 4, "validate_steps": 4}
    project = make_project(folder / "project", folder / "corpus", folder / "teacher", train=train, run={"workers": 1})
    (project.home / "mlflow").mkdir(parents=True)
    MlflowClient(project.mlflow).search_experiments()
    return project


def used_kilobytes(database: Path) -> float:
    """Returns the size of the pages in use, since SQLite does not shrink the file but reuses its empty pages."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        count, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return float((count - free) * size) / 1e3


def rows_of(database: Path) -> dict[str, int]:
    """Returns the number of rows of each table."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


# ---- the runs --------------------------------------------------------------------------------------------------


def soak(made: Soak, runs: int, seconds: float = float("inf")) -> Iterator[Sample]:
    """Yields a sample after each run, until the time limit in seconds.

    Runs the complete pipeline and `prepare` once before the first sample, for imports, connections and caches.
    """
    end = time.monotonic() + seconds
    made.run(-1, "distill")
    made.run(0, "prepare")
    for number in range(1, runs + 1):
        if time.monotonic() < end:
            yield made.run(number, "prepare" if number % CHAIN_EVERY else "distill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line every ten runs, then the verdict. Returns 1 if a resource grew above its bound, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.soak.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=500, help="number of runs")
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
    growing = {"memory": "process", "server memory": "server", "prefect": "Prefect's database until retention"}
    slopes = {name: growth([one.figures[name] for one in samples]) for name in growing}
    per_run = ", ".join(f"{value:+.2f} {BOUNDS[name].unit} {growing[name]}" for name, value in slopes.items())
    other = ", ".join(grown(samples)) or "none"
    record("tests.hard.soak.soak", f"{len(samples)} runs; growth per run: {per_run}; above their bounds: {other}")
    print(f"after retention: {', '.join(left) if left else 'the initial size'}")
    return int(bool(left or grown(samples)))


if __name__ == "__main__":
    sys.exit(main())
