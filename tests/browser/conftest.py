"""A real browser on a real `distil up`: Debian's Chromium, driven by Playwright, and two small recipes in one home.

Skips with a reason where no Chromium is installed. DISTIL_SCREENS=FOLDER keeps the screenshots that the README shows.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from tests.harness.project import TRUNCATED, Project, environment, make_project
from tests.harness.recipe_values import recipe_toml
from tests.harness.servers.up import Up, running_up
from tests.harness.tiny import make_teacher, write_oscar

CHROMIUM = os.environ.get("DISTIL_CHROMIUM") or shutil.which("chromium") or ""
PATIENCE = 180.0
"""Seconds within which a page shows the end of a run, on two busy cores."""
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TRUNCATED_RECIPE = "truncated"
"""Name of the recipe with a truncated source."""


@dataclass(frozen=True)
class Site:
    """A running `distil up`, the project with the recipe `tiny`, and the project with a truncated source."""

    up: Up
    project: Project
    truncated: Project
    complete_source: bytes

    @property
    def truncated_file(self) -> Path:
        return self.truncated.folder / "corpus" / TRUNCATED


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`distil up` with both recipes, on free ports; stopped by Ctrl-C."""
    if not CHROMIUM:
        pytest.skip("no Chromium here; install Debian's `chromium`, or name one in DISTIL_CHROMIUM")
    folder = tmp_path_factory.mktemp("browser")
    make_teacher(folder / "teacher")
    project = make_project(folder / "tiny", write_oscar(folder / "tiny" / "corpus"), folder / "teacher")
    truncated, complete_source = _truncated_project(folder / "truncated", project, folder / "teacher")
    with running_up(project.folder, environment(project.folder), project.recipe, truncated.recipe) as up:
        yield Site(up, project, truncated, complete_source)
        assert up.stop(signal.SIGINT) == 0, up.output


def _truncated_project(folder: Path, like: Project, teacher: Path) -> tuple[Project, bytes]:
    """A project with the home of another one, whose second source is truncated; and its complete bytes."""
    corpus = write_oscar(folder / "corpus")
    plain = corpus / TRUNCATED.removesuffix(".zst")
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(plain.read_bytes())
    plain.unlink()
    (corpus / TRUNCATED).write_bytes(packed[: len(packed) // 2])
    names = {"name": TRUNCATED_RECIPE, "register": {"name": TRUNCATED_RECIPE}}
    project = make_project(folder, corpus, teacher, **names)
    text = recipe_toml(home=like.home, corpus=corpus, teacher=teacher, **names)
    project.recipe.write_text(text, encoding="utf-8")
    return project, packed


@pytest.fixture
def screens(tmp_path: Path) -> Path:
    """The folder of the screenshots."""
    return Path(os.environ.get("DISTIL_SCREENS", tmp_path))
