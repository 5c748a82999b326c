"""Fixtures that the tests of all packages share, how tests are grouped onto workers, and how results are recorded."""

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.hard import reliability
from tests.harness.servers.postgres import postgres
from tests.harness.servers.s3 import s3

__all__ = ["postgres", "s3"]

# OpenMP threads that wait keep a core busy by default, which slows two workers on two cores many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# For .ci/nightly: 1,000 random examples per property.
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=1000)

REPO = Path(__file__).resolve().parent.parent
HISTORY = "tests/end_to_end/"
"""The default suite's tests in this folder share a history of runs that takes half a minute to make."""


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile`: one file, one worker. In the default suite all HISTORY files are in one worker."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = nodeid.startswith(HISTORY) and config.option.markexpr == "not slow"
            return HISTORY if shared else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Records for tests/RELIABILITY.md how many tests of each file passed, failed and were skipped."""
    if hasattr(terminalreporter.config, "workerinput"):
        return  # a worker of xdist; the main process has its results too
    results: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            results[report.nodeid.split("::")[0]][outcome] += 1
    for file, counts in results.items():
        reliability.record(file, counts)


@pytest.fixture(autouse=True, scope="module")
def mlflow_of_this_file() -> Iterator[None]:
    """Unsets after each file the tracking URI that it set: MLFLOW_* and MLflow's own memory of it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    if mlflow := sys.modules.get("mlflow"):
        mlflow.set_tracking_uri(before.get("MLFLOW_TRACKING_URI"))
    os.environ.update(before)


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
