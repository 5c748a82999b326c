"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.postgres import postgres
from tests.harness.s3 import s3

__all__ = ["postgres", "s3"]

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, so that the order of sums does not depend on the machine's cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real French text and evaluation sets that are not part of the project; skips where they are absent."""
    folder = Path(os.environ.get("DISTIL_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set DISTIL_TEST_DATA")
    return folder
