"""Reading ahead: the next window is there before it is needed, what was passed is let go, and batches stay the same."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import FatalError
from storage.store import Store
from tasks.loader.batch import Batch, BatchLoader, MaskingRule, step_ranges
from tasks.loader.dataset import BlockDataset
from tasks.loader.order import DataOrder
from tasks.loader.prefetch import ReadAhead
from tasks.recipe.config import MaskSettings
from tasks.recipe.run_spec import Part
from tasks.tokens.vocabulary import Vocabulary, load_vocabulary
from tests.harness.tiny import make_parts, save_tokenizer
from tests.tasks.loader.test_order import ORDERS

SHARDS, WINDOW, BATCH = 6, 2, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, tuple[Part, ...], Vocabulary]:
    """Blocks of six shards in a store that is not on this machine."""
    folder = tmp_path_factory.mktemp("ahead")
    save_tokenizer(folder / "tokenizer")
    store = Store(f"memory://{uuid.uuid4().hex}", cache=folder / "home" / "cache")
    parts = make_parts(store, folder / "tokenizer", shards=SHARDS, texts=10)
    return store, parts, load_vocabulary(str(folder / "tokenizer"))


def loader_of(place: tuple[Store, tuple[Part, ...], Vocabulary], store: Store, epochs: int = 2) -> BatchLoader:
    _, parts, vocabulary = place
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    corpus, steps = BlockDataset(store, parts, cached=False), epochs * order.rows // BATCH
    ahead = ReadAhead(corpus, order, steps * BATCH, variants=1)
    plan = step_ranges(0, steps, BATCH, 0, 0, 1)
    return BatchLoader(
        corpus, MaskingRule(vocabulary, MaskSettings(), False), order, plan, ahead, prefetch=2, pin=False
    )


def ids_of(batches: Iterator[list[Batch]]) -> list[bytes]:
    return [batch.input_ids.numpy().tobytes() for step in batches for batch in step]


def test_a_cache_that_holds_nothing_changes_no_batch(
    place: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    small = Store(place[0].root, cache=tmp_path / "cache", cache_bytes=1)
    assert ids_of(iter(loader_of(place, small))) == ids_of(iter(loader_of(place, place[0])))


def test_only_the_windows_in_work_and_the_next_one_are_held(
    place: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, _ = place
    small = Store(store.root, cache=tmp_path / "cache", cache_bytes=1)
    loader = loader_of(place, small)
    copies = set()
    for number, _ in enumerate(loader):
        now = {entry.folder.parent.name for entry in small.cache.entries()}
        assert len(now) <= 3 * WINDOW + 1, (
            f"step {number}"
        )  # two windows in work at a border, the next, one just fetched
        copies |= now
    assert copies == {part.blocks for part in parts}


def test_the_next_window_is_there_before_it_is_needed(
    place: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, _ = place
    cold = Store(store.root, cache=tmp_path / "cache")
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    corpus = BlockDataset(cold, parts, cached=False)
    with ReadAhead(corpus, order, 2 * order.rows, variants=1) as ahead:
        ahead.move(0, 1)
        ahead.settle()
    first, second = order.window_at(0), order.window_at(order.window_at(0).stop)
    wanted = {parts[number].blocks for number in (*first.parts, *second.parts)}
    assert {entry.folder.parent.name for entry in cold.cache.entries()} == wanted


def test_what_cannot_be_read_ahead_is_said_when_it_is_needed(
    place: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, vocabulary = place
    lost = (parts[0].model_copy(update={"blocks": "0" * 64, "label": "lost-0000"}), *parts[1:])
    cold = Store(store.root, cache=tmp_path / "cache")
    with pytest.raises(FatalError, match="lost-0000 is not in the store"):
        ids_of(iter(loader_of((cold, lost, vocabulary), cold)))


@given(ORDERS, st.integers(0, 500))
def test_a_window_is_what_its_rows_come_from(order: DataOrder, row: int) -> None:
    window = order.window_at(row)
    assert window.start <= row < window.stop
    parts, _, epochs = order.stretch(window.start, window.stop)
    assert set(epochs.tolist()) == {window.epoch}
    assert sorted(window.parts) == np.unique(parts).tolist()
    assert len(parts) == sum(order.sizes[part] for part in window.parts)
