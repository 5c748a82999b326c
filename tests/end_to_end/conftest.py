"""What the end-to-end tests share: a teacher, a Prefect server, a process for many commands, and one whole history."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from tests.harness.place import BROKEN, History, Result, Shell, environment, make_place, mount
from tests.harness.server import serving
from tests.harness.tiny import make_teacher, write_oscar


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CamemBERT of four tiny layers with random weights."""
    folder = tmp_path_factory.mktemp("model") / "teacher"
    make_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory, teacher: Path, server: str) -> History:
    """The first run asks a server, the second brings its own, the third needs none."""
    folder = tmp_path_factory.mktemp("history")
    corpus = write_oscar(folder / "corpus")
    plain = corpus / BROKEN.removesuffix(".zst")
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(plain.read_bytes())
    plain.unlink()
    (corpus / BROKEN).write_bytes(packed[: len(packed) // 2])
    place = make_place(folder, corpus, teacher, workers=3)
    broken = place.distil("run", server=server)
    broken_stamps = place.stamps()
    (corpus / BROKEN).write_bytes(packed)
    whole = place.distil("run")
    whole_stamps = place.stamps()
    again = place.distil("run")
    return History(place, broken, broken_stamps, whole, whole_stamps, again, place.stamps())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API URL of a Prefect server on a free port."""
    with serving(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory, server: str) -> Iterator[Shell]:
    """`shell("status", place.recipe, …)` runs `distil` in a process that stays, against the shared server."""
    folder = tmp_path_factory.mktemp("shell")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.shell"],
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
    return Path(shutil.copytree(history.place.folder / "corpus", tmp_path / "corpus"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB; only root may mount one."""
    folder = tmp_path / "disk"
    mount(folder, "128k")
    yield folder
    subprocess.run(["umount", folder], check=True)
