"""A real browser on a real `distil up`: Debian's Chromium, driven by Playwright, and two small recipes in one home.

Skips with a reason where no Chromium is installed. DISTIL_SCREENS=FOLDER keeps the screenshots that the README shows.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from flows.services.process import free_port
from tests.harness.place import BROKEN, LIMIT, Place, environment, make_place
from tests.harness.tiny import make_teacher, write_oscar

CHROMIUM = os.environ.get("DISTIL_CHROMIUM") or shutil.which("chromium") or ""
PATIENCE = 180.0
"""Seconds in which the stack starts and a run ends, on two busy cores."""
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
BROKEN_RECIPE = "mended"
"""Name of the recipe with a source that is cut short."""


@dataclass(frozen=True)
class Stack:
    """A running `distil up`: its addresses, and the place with the recipe `tiny` and that with a broken source."""

    prefect: str
    mlflow: str
    place: Place
    broken: Place
    whole_source: bytes

    @property
    def broken_file(self) -> Path:
        """The source that is cut short."""
        return self.broken.folder / "corpus" / BROKEN


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`distil up` with both recipes, on free ports; stopped by Ctrl-C."""
    if not CHROMIUM:
        pytest.skip("no Chromium here; install Debian's `chromium`, or name one in DISTIL_CHROMIUM")
    folder = tmp_path_factory.mktemp("browser")
    make_teacher(folder / "teacher")
    place = make_place(folder / "tiny", write_oscar(folder / "tiny" / "corpus"), folder / "teacher")
    broken, whole = _broken_place(folder / "broken", place)
    variables = environment(folder)
    log = folder / "up.log"
    command = [sys.executable, "-m", "flows.cli", "up", str(place.recipe), str(broken.recipe)]
    ports = ["--port", str(free_port("Prefect", None)), "--mlflow-port", str(free_port("MLflow", None))]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *ports], cwd=folder, env=variables, stdout=output, stderr=output)
    try:
        wait_for(lambda: (place.home / "run" / "up.json").exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        up = json.loads((place.home / "run" / "up.json").read_text(encoding="utf-8"))
        yield Stack(up["prefect_ui"], up["mlflow"], place, broken, whole)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0, log.read_text(encoding="utf-8")


def _broken_place(folder: Path, like: Place) -> tuple[Place, bytes]:
    """A place with the home of another one, whose second source is cut short; and that source's bytes when whole."""
    corpus = write_oscar(folder / "corpus")
    plain = corpus / BROKEN.removesuffix(".zst")
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(plain.read_bytes())
    plain.unlink()
    (corpus / BROKEN).write_bytes(packed[: len(packed) // 2])
    text = like.recipe.read_text(encoding="utf-8")
    text = text.replace('name = "tiny"', f'name = "{BROKEN_RECIPE}"')
    text = text.replace(json.dumps(str(like.folder / "corpus")), json.dumps(str(corpus)))
    place = Place(folder)
    place.recipe.write_text(text + f'\n[register]\nname = "{BROKEN_RECIPE}"\n', encoding="utf-8")
    return place, packed


def wait_for(what: Callable[[], bool]) -> None:
    """Returns when it is so; fails after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)


@pytest.fixture
def screens(tmp_path: Path) -> Path:
    """Where screenshots go."""
    return Path(os.environ.get("DISTIL_SCREENS", tmp_path))
