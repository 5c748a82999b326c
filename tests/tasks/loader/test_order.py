"""Data order: every row once an epoch, the same whoever asks, shuffled, windowed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.loader.order import DataOrder

ORDERS = st.builds(
    DataOrder,
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9).map(tuple),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)


def pairs(order: DataOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in order.stretch(start, stop)), strict=True))


@given(ORDERS)
def test_an_epoch_has_every_row_once(order: DataOrder) -> None:
    seen = pairs(order, order.rows, 2 * order.rows)
    assert {epoch for _, _, epoch in seen} == {1}
    assert sorted((part, row) for part, row, _ in seen) == [
        (part, row) for part, size in enumerate(order.sizes) for row in range(size)
    ]


@given(ORDERS, st.data())
def test_a_stretch_does_not_depend_on_how_it_is_cut(order: DataOrder, data: st.DataObject) -> None:
    stop = 3 * order.rows
    cut = data.draw(st.integers(1, stop - 1))
    assert pairs(order, 0, cut) + pairs(order, cut, stop) == pairs(order, 0, stop)


@given(ORDERS, st.data())
def test_a_window_begins_and_ends_where_counting_its_rows_says(order: DataOrder, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, 3 * order.rows - 1))
    epoch, stop = row // order.rows, row // order.rows * order.rows
    shuffled = np.random.Generator(np.random.Philox(np.random.SeedSequence([order.seed, epoch])))
    parts = shuffled.permutation(len(order.sizes)).tolist()
    while stop <= row:
        window, parts = tuple(parts[: order.window]), parts[order.window :]
        start, stop = stop, stop + sum(order.sizes[part] for part in window)
    assert order.window_at(row) == (epoch, window, start, stop)


@given(ORDERS, st.data())
def test_a_stretch_is_its_windows_shuffled_one_after_the_other(order: DataOrder, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 3 * order.rows - 1))
    stop = data.draw(st.integers(start + 1, 3 * order.rows))
    expected: list[tuple[int, int, int]] = []
    for epoch in range(3):
        path = [order.seed, epoch]
        shuffled = np.random.Generator(np.random.Philox(np.random.SeedSequence(path)))
        parts = shuffled.permutation(len(order.sizes)).tolist()
        for number in range(0, len(parts), order.window):
            window = parts[number : number + order.window]
            rows = [(part, row, epoch) for part in window for row in range(order.sizes[part])]
            path = [order.seed, epoch, number // order.window + 1]
            within = np.random.Generator(np.random.Philox(np.random.SeedSequence(path)))
            expected += [rows[i] for i in within.permutation(len(rows)).tolist()]
    assert pairs(order, start, stop) == expected[start:stop]


def test_epochs_and_seeds_differ_and_rows_are_shuffled() -> None:
    order = DataOrder((50, 50, 50, 50), window=2, seed=1)
    first, second = pairs(order, 0, 200), pairs(order, 200, 400)
    assert [p[:2] for p in first] != [p[:2] for p in second]
    assert first != pairs(DataOrder(order.sizes, 2, seed=2), 0, 200)
    assert [row for _, row, _ in first] != sorted(row for _, row, _ in first)


def test_only_a_window_of_shards_is_open_at_once() -> None:
    order = DataOrder((100,) * 6, window=2, seed=0)
    parts = order.stretch(0, order.rows)[0]
    for window in np.split(parts, 3):
        assert len(set(window.tolist())) == 2


def test_the_order_of_a_run_is_for_good() -> None:
    """A run that goes on with a newer version reads what it would have read."""
    parts, rows, epochs = (column.tolist() for column in DataOrder((3, 0, 2, 4), window=2, seed=7).stretch(0, 20))
    assert parts == [0, 0, 0, 3, 3, 3, 2, 2, 3, 3, 3, 3, 3, 0, 0, 2, 0, 2, 3, 3]
    assert rows == [1, 0, 2, 2, 0, 1, 1, 0, 3, 2, 0, 3, 1, 2, 1, 1, 0, 0, 0, 1]
    assert epochs == [0] * 9 + [1] * 9 + [2] * 2
