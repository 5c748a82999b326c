"""Starts a PostgreSQL server for tests in a temporary folder, on a free loopback port, with a password.

    with started_postgres() as database:
        database.prefect, database.mlflow

Requires the PostgreSQL programs (Debian: `apt-get install postgresql`). PostgreSQL does not run as root; root therefore
starts it as the user `postgres` or `nobody`.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 120.0
USER = "distil"
ACCOUNTS = ("postgres", "nobody")


@dataclass(frozen=True)
class Postgres:
    """A server with two empty databases, and their URLs in the formats of Prefect and MLflow."""

    port: int
    password: str

    @property
    def prefect(self) -> str:
        """The value for PREFECT_API_DATABASE_CONNECTION_URL."""
        return f"postgresql+asyncpg://{USER}:{self.password}@127.0.0.1:{self.port}/prefect"

    @property
    def mlflow(self) -> str:
        """The value for MLFLOW_BACKEND_STORE_URI."""
        return f"postgresql+psycopg2://{USER}:{self.password}@127.0.0.1:{self.port}/mlflow"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Starts a PostgreSQL server for the session; skips the tests if its programs are not installed."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (no initdb in PATH or /usr/lib/postgresql/*/bin); install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed; install the extra `postgres`")
    with started_postgres() as database:
        yield database


def programs() -> Path | None:
    """Returns the folder of initdb and postgres: from PATH, else the newest version of Debian, else None."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return max(folders, key=lambda folder: float(folder.parent.name), default=None)


@contextmanager
def started_postgres() -> Iterator[Postgres]:
    """Runs a server with the databases prefect and mlflow, and removes it with its folder afterwards."""
    there, account = programs(), _account()
    assert there
    # Not below pytest's temporary folder, which only its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="distil-postgres-"))
    try:
        if account:
            os.chown(folder, account["user"], account["group"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            database = Postgres(probe.getsockname()[1], secrets.token_hex(16))
        _make_cluster(there, folder, database.password, account)
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    there / "postgres",
                    "-D",
                    folder / "data",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(database.port),
                    "-k",
                    "",
                    "-F",
                ],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **account,
            )
        try:
            _make_databases(server, database, folder / "log")
            yield database
        finally:
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown, which ends open sessions
            server.wait(60)
    finally:
        shutil.rmtree(folder)


def _account() -> dict[str, Any]:
    """Returns the server's user and group as arguments of Popen; empty unless this process runs as root."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = next(known[name] for name in ACCOUNTS if name in known)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _make_cluster(there: Path, folder: Path, password: str, account: dict[str, Any]) -> None:
    secret = folder / "password"
    secret.touch(0o600)
    secret.write_text(password, encoding="ascii")
    if account:
        os.chown(secret, account["user"], account["group"])
    login = ["-U", USER, f"--pwfile={secret}", "-A", "scram-sha-256"]
    made = subprocess.run(
        [there / "initdb", "-D", folder / "data", *login, "-E", "UTF8", "--no-locale", "--no-sync"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        **account,
    )
    secret.unlink()
    assert made.returncode == 0, made.stderr


def _make_databases(server: "subprocess.Popen[bytes]", database: Postgres, log: Path) -> None:
    """Waits until the server responds, then creates both databases."""
    import psycopg2

    end = time.monotonic() + START_SECONDS
    while True:
        assert server.poll() is None, log.read_text(encoding="utf-8")
        try:
            session = psycopg2.connect(
                host="127.0.0.1", port=database.port, user=USER, password=database.password, dbname="postgres"
            )
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.1)
    session.autocommit = True
    with session.cursor() as cursor:
        cursor.execute("create database prefect")
        cursor.execute("create database mlflow")
    session.close()
