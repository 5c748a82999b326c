"""The fixture `store`: an empty store on a local disk, and one in memory that is read through the local cache.

from tests.harness.stores import store      # and __all__, as for any imported fixture
"""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "store")
    else:
        yield Store(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
