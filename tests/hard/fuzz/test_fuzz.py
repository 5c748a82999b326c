"""Checks that random and slightly damaged external input raises no exceptions except FatalError and RetryableError.

DISTIL_FUZZ sets the number of examples per target (by default 40); guided.py fuzzes guided by coverage.
"""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import FatalError
from tests.hard.fuzz.targets import TARGETS, attempt, seeds

FOUND = sorted((Path(__file__).parent / "found").iterdir())
"""Inputs of former findings by target: column names that are not text, and footers that contradict themselves."""
EXAMPLES = int(os.environ.get("DISTIL_FUZZ", "40"))


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """Draws a valid input with some bytes changed, removed or inserted."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(0, 3))
        data[at : at + size] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_no_error_but_ours(target: str) -> None:
    inputs = st.one_of(st.binary(max_size=400), damaged(seeds(target)))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(inputs)
    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            attempt(target, data, Path(folder))

    run()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_is_refused(path: Path, tmp_path: Path) -> None:
    target = TARGETS[path.name.split("-")[0]]
    with pytest.raises(FatalError, match="damaged"):
        target(path.read_bytes(), tmp_path)
