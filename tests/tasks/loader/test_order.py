"""Data order: each epoch contains every row once, shuffled within windows, as a function of seed and position alone."""

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


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain integers, from the paper (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & 0xFFFFFFFF,
            (left >> 32) ^ c3 ^ k1,
            left & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def permutation(seed: int, epoch: int, stream: int, size: int) -> list[int]:
    """Items sorted by one 64-bit word each, equal leading bits by index."""

    def key(item: int) -> tuple[int, int]:
        words = philox4x32((item // 2, stream, epoch, 0), (seed, 0))
        low, high = words[2 * (item % 2) : 2 * (item % 2) + 2]
        return ((high << 32) | low) >> (size - 1).bit_length(), item

    return sorted(range(size), key=key)


def epoch_rows(order: DataOrder, epoch: int) -> list[tuple[int, int, int]]:
    """(part, row, epoch) of one epoch in plain Python: parts shuffled, then the rows of each window."""
    parts, expected = permutation(order.seed, epoch, 0, len(order.sizes)), []
    for number, start in enumerate(range(0, len(parts), order.window)):
        window = parts[start : start + order.window]
        rows = [(part, row, epoch) for part in window for row in range(order.sizes[part])]
        expected += [rows[i] for i in permutation(order.seed, epoch, number + 1, len(rows))]
    return expected


def rows_of(order: DataOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in order.slice(start, stop)), strict=True))


@given(ORDERS)
def test_an_epoch_contains_every_row_once(order: DataOrder) -> None:
    seen = rows_of(order, order.rows, 2 * order.rows)
    assert {epoch for _, _, epoch in seen} == {1}
    assert sorted((part, row) for part, row, _ in seen) == [
        (part, row) for part, size in enumerate(order.sizes) for row in range(size)
    ]


@given(ORDERS, st.data())
def test_adjacent_slices_join_to_one_slice(order: DataOrder, data: st.DataObject) -> None:
    stop = 3 * order.rows
    cut = data.draw(st.integers(1, stop - 1))
    assert rows_of(order, 0, cut) + rows_of(order, cut, stop) == rows_of(order, 0, stop)


@given(ORDERS, st.data())
def test_window_at_gives_the_parts_and_bounds_of_a_row(order: DataOrder, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, 3 * order.rows - 1))
    epoch, stop = row // order.rows, row // order.rows * order.rows
    parts = permutation(order.seed, epoch, 0, len(order.sizes))
    while stop <= row:
        window, parts = tuple(parts[: order.window]), parts[order.window :]
        start, stop = stop, stop + sum(order.sizes[part] for part in window)
    assert order.window_at(row) == (epoch, window, start, stop)


@given(ORDERS, st.data())
def test_a_slice_is_its_shuffled_windows_in_sequence(order: DataOrder, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 3 * order.rows - 1))
    stop = data.draw(st.integers(start + 1, 3 * order.rows))
    expected = [row for epoch in range(3) for row in epoch_rows(order, epoch)]
    assert rows_of(order, start, stop) == expected[start:stop]


def test_epochs_and_seeds_differ_and_rows_are_shuffled() -> None:
    order = DataOrder((50, 50, 50, 50), window=2, seed=1)
    first, second = rows_of(order, 0, 200), rows_of(order, 200, 400)
    assert [p[:2] for p in first] != [p[:2] for p in second]
    assert first != rows_of(DataOrder(order.sizes, 2, seed=2), 0, 200)
    assert [row for _, row, _ in first] != sorted(row for _, row, _ in first)


def test_every_position_is_equally_likely() -> None:
    """Where row 0 of a window of 8 lands over 4,000 epochs: each position within five standard deviations of 1 / 8."""
    order, epochs = DataOrder((8,), window=1, seed=5), 4000
    rows = order.slice(0, epochs * 8)[1].reshape(epochs, 8)
    counts = (rows == 0).sum(axis=0)
    assert (abs(counts - epochs / 8) < 5 * (epochs * 7 / 64) ** 0.5).all()


def test_rows_come_from_one_window_of_shards_at_a_time() -> None:
    order = DataOrder((100,) * 6, window=2, seed=0)
    parts = order.slice(0, order.rows)[0]
    for window in np.split(parts, 3):
        assert len(set(window.tolist())) == 2


def test_data_order_is_frozen() -> None:
    """If this fails, data order changed and resumed runs would repeat blocks: raise the schema number of runs."""
    parts, rows, epochs = (column.tolist() for column in DataOrder((3, 0, 2, 4), window=2, seed=7).slice(0, 20))
    assert parts == [0, 0, 0, 2, 3, 3, 2, 3, 3, 0, 0, 0, 3, 2, 3, 3, 3, 2, 2, 2]
    assert rows == [2, 0, 1, 0, 0, 1, 1, 3, 2, 2, 0, 1, 0, 0, 2, 3, 1, 1, 1, 0]
    assert epochs == [0] * 9 + [1] * 9 + [2] * 2
    expected = [row for epoch in range(3) for row in epoch_rows(DataOrder((3, 0, 2, 4), window=2, seed=7), epoch)]
    assert list(zip(parts, rows, epochs, strict=True)) == expected[:20]
