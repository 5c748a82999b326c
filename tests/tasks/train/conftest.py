"""Fixtures that several tests of the trainer share."""

from pathlib import Path

import pytest

from storage.store import Store
from tests.harness.tiny import make_parts, make_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and a store of blocks."""
    folder = tmp_path_factory.mktemp("train")
    make_teacher(folder / "teacher")
    make_parts(Store(folder / "store"), folder / "teacher", shards=3)
    return folder
