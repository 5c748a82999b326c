"""The timings of `distil plan` run in a separate process, and its errors are one sentence."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.snapshot import take_snapshot
from tasks.lineage import Workspace
from tasks.plan import timing
from tasks.plan.sample import take_sample
from tasks.plan.timing import measure
from tasks.recipe.load import make_recipe
from tests.harness.tiny import make_teacher, write_oscar

SECONDS = 0.1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timing")
    make_teacher(folder / "teacher")
    write_oscar(folder / "corpus", parts=1, texts=20)
    return folder


@pytest.fixture
def scratch(place: Path, tmp_path: Path) -> Workspace:
    """A scratch store, and a recipe whose trainer uses another number of threads than this process."""
    values = {
        "name": "tiny",
        "corpus": {"url": str(place / "corpus"), "heldout_per_mille": 0},
        "teacher": {"model": str(place / "teacher")},
        "blocks": {"length": 32},
        "student": {"layers": 1},
        "train": {"device": "cpu", "batch_rows": 4, "threads": 2},
    }
    return Workspace(Store(tmp_path / "scratch"), make_recipe(values, "test"))


@pytest.fixture
def blocks(scratch: Workspace) -> tuple[Ref, ...]:
    recipe = scratch.recipe
    settings = (recipe.corpus, recipe.blocks, recipe.mask, scratch.vocabulary)
    return take_sample(scratch.store, *settings, take_snapshot(recipe.corpus).sources, 1_000_000).blocks


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refuse() -> None:
    raise AssertionError("this process must keep its memory settings")


def test_the_caller_keeps_its_thread_and_memory_settings(
    scratch: Workspace, blocks: tuple[Ref, ...], one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "keep_freed_memory", refuse)  # in this process, not in the one that is timed
    found = measure(scratch, blocks, SECONDS)
    assert torch.get_num_threads() == 1
    assert found.rows > 0
    assert min(found.load, found.capture, found.step, found.save) > 0


def test_an_error_of_the_timed_process_is_one_sentence(scratch: Workspace) -> None:
    with pytest.raises(FatalError, match=r"^recipe tiny: the sample of .* contains no text; correct corpus\.url"):
        measure(scratch, (), SECONDS)


def test_nothing_is_timed_if_no_model_runs(scratch: Workspace) -> None:
    online = scratch.with_changes({"targets.source": "online"})
    assert measure(online, (), SECONDS, training=False).capture == 0
