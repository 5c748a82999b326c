"""Prefetching: the next window is cached before it is needed, earlier windows are released, batches are unchanged."""

import time
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
from tasks.recipe.run_json import Part
from tasks.tokens.vocabulary import Vocabulary, load_vocabulary
from tests.harness.tiny import make_parts, save_tokenizer
from tests.tasks.loader.test_order import ORDERS

SHARDS, WINDOW, BATCH = 6, 2, 4


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, tuple[Part, ...], Vocabulary]:
    """Blocks of six shards in a remote store, its manifest and vocabulary."""
    folder = tmp_path_factory.mktemp("ahead")
    save_tokenizer(folder / "tokenizer")
    store = Store(f"memory://{uuid.uuid4().hex}", cache=folder / "home" / "cache")
    parts = make_parts(store, folder / "tokenizer", shards=SHARDS, texts=10)
    return store, parts, load_vocabulary(str(folder / "tokenizer"))


def loader_of(remote: tuple[Store, tuple[Part, ...], Vocabulary], store: Store, epochs: int = 2) -> BatchLoader:
    _, parts, vocabulary = remote
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    dataset, steps = BlockDataset(store, parts, cached=False), epochs * order.rows // BATCH
    read_ahead = ReadAhead(dataset, order, steps * BATCH, variants=1)
    ranges = step_ranges(0, steps, BATCH, 0, 0, 1)
    masking = MaskingRule(vocabulary, MaskSettings(), False)
    return BatchLoader(dataset, masking, order, ranges, read_ahead, prefetch=2, pin=False)


def cached_blocks(store: Store) -> set[str]:
    """Keys of the blocks in the local cache."""
    return {entry.folder.parent.name for entry in store.cache.entries()}


def ids_of(batches: Iterator[list[Batch]]) -> list[bytes]:
    return [batch.input_ids.numpy().tobytes() for step in batches for batch in step]


def test_a_full_cache_changes_no_batch(remote: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path) -> None:
    small = Store(remote[0].root, cache=tmp_path / "cache", cache_bytes=1)
    assert ids_of(iter(loader_of(remote, small))) == ids_of(iter(loader_of(remote, remote[0])))


def test_only_current_windows_and_the_next_one_stay_cached(
    remote: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, _ = remote
    small = Store(store.root, cache=tmp_path / "cache", cache_bytes=1)
    loader = loader_of(remote, small)
    copies = set()
    for number, _ in enumerate(loader):
        now = cached_blocks(small)
        # Two windows at a border, the next one, and one part that was just copied.
        assert len(now) <= 3 * WINDOW + 1, f"step {number}"
        copies |= now
    assert copies == {part.blocks for part in parts}


def test_the_next_window_is_cached_before_it_is_needed(
    remote: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, _ = remote
    cold = Store(store.root, cache=tmp_path / "cache")
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    dataset = BlockDataset(cold, parts, cached=False)
    first, second = order.window_at(0), order.window_at(order.window_at(0).stop)
    wanted = {parts[number].blocks for number in (*first.parts, *second.parts)}
    with ReadAhead(dataset, order, 2 * order.rows, variants=1) as read_ahead:
        read_ahead.move(0, 1)
        deadline = time.monotonic() + 30
        while cached_blocks(cold) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert cached_blocks(cold) == wanted


def test_a_prefetch_error_is_raised_when_its_batch_is_needed(
    remote: tuple[Store, tuple[Part, ...], Vocabulary], tmp_path: Path
) -> None:
    store, parts, vocabulary = remote
    lost = (parts[0].model_copy(update={"blocks": "0" * 64, "label": "lost-0000"}), *parts[1:])
    cold = Store(store.root, cache=tmp_path / "cache")
    with pytest.raises(FatalError, match="lost-0000 is not in the store"):
        ids_of(iter(loader_of((cold, lost, vocabulary), cold)))


@given(ORDERS, st.integers(0, 500))
def test_a_window_names_the_parts_of_its_rows(order: DataOrder, row: int) -> None:
    window = order.window_at(row)
    assert window.start <= row < window.stop
    parts, _, epochs = order.slice(window.start, window.stop)
    assert set(epochs.tolist()) == {window.epoch}
    assert sorted(window.parts) == np.unique(parts).tolist()
    assert len(parts) == sum(order.sizes[part] for part in window.parts)
