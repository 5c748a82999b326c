"""Shared by the end-to-end tests: a teacher, a Prefect server, a process for many commands, one history of runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from tests.harness.mounts import mount
from tests.harness.project import TRUNCATED, History, Result, Shell, environment, make_project
from tests.harness.servers.prefect_server import serving
from tests.harness.tiny import make_teacher, write_oscar


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CamemBERT of four tiny layers with random weights."""
    folder = tmp_path_factory.mktemp("model") / "teacher"
    make_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory, teacher: Path, server: str) -> History:
    """The first run uses the shared server, the second starts its own, the third needs none."""
    folder = tmp_path_factory.mktemp("history")
    corpus = write_oscar(folder / "corpus")
    plain = corpus / TRUNCATED.removesuffix(".zst")
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(plain.read_bytes())
    plain.unlink()
    (corpus / TRUNCATED).write_bytes(packed[: len(packed) // 2])
    project = make_project(folder, corpus, teacher, run={"workers": 3})
    truncated = project.distil("run", server=server)
    truncated_times = project.creation_times()
    (corpus / TRUNCATED).write_bytes(packed)
    complete = project.distil("run")
    complete_times = project.creation_times()
    repeated = project.distil("run")
    return History(project, truncated, truncated_times, complete, complete_times, repeated, project.creation_times())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a Prefect server on a free port."""
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server.url


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory, server: str) -> Iterator[Shell]:
    """`shell("status", project.recipe, …)` runs `distil` in one long-lived process, against the shared server."""
    folder = tmp_path_factory.mktemp("shell")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.programs.shell"],
        cwd=folder,
        env=environment(folder, server),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout

    def distil(*arguments: object) -> Result:
        print(json.dumps([str(argument) for argument in arguments]), file=process.stdin, flush=True)
        line = process.stdout.readline() if process.stdout else ""
        assert line, f"the process ended with {process.wait()}"
        return Result(*json.loads(line))

    yield distil
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.fixture
def corpus_copy(history: History, tmp_path: Path) -> Path:
    """The corpus of the history, free to be changed."""
    return Path(shutil.copytree(history.project.folder / "corpus", tmp_path / "corpus"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB; only root may mount one."""
    folder = tmp_path / "disk"
    mount(folder, "128k")
    yield folder
    subprocess.run(["umount", folder], check=True)
