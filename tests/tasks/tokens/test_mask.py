"""Masks: reproducible on every machine and in every version, unbiased, and never on special tokens."""

import numpy as np
import numpy.typing as npt
import pytest

from tasks.recipe.config import MaskSettings
from tasks.tokens.mask import IGNORE_INDEX, MaskedRows, mask_rows, row_digests
from tasks.tokens.vocabulary import Vocabulary

KEY = "ab" * 32
BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 4
SPECIALS = (BOS, PAD, EOS, UNK, MASK)

# positions, labels, new ids
GOLDEN_UNIFORM = (
    [[2, 7, 10, 14, 17, 18], [2, 3, 6, 7, 0, 0]],
    [[101, 106, 109, 113, 116, 117], [201, 202, 205, 206, -100, -100]],
    [[4, 4, 4, 938, 4, 117], [201, 4, 4, 4, 0, 0]],
)
GOLDEN_SMOOTHED = (
    [[1, 2, 7, 13, 14, 16], [1, 4, 6, 7, 0, 0]],
    [[100, 101, 106, 112, 113, 115], [200, 203, 205, 206, -100, -100]],
    [[4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 0, 0]],
)
GOLDEN_DIGESTS = ["c0f5b6d7ab22f3dd", "2ed08cdf5ea627b6"]


def vocabulary_of(size: int) -> Vocabulary:
    return Vocabulary("test", "", f"size {size}", size, PAD, BOS, EOS, MASK, UNK, SPECIALS, (UNK,))


VOCABULARY = vocabulary_of(1000)
Array = npt.NDArray[np.int64]


def blocks(lengths: list[int], length: int, low: int = 5, size: int = 1000) -> tuple[Array, Array]:
    """Rows of bos, ordinary ids (the same in every call), eos and padding; their lengths."""
    ids = np.random.RandomState(7).randint(low, size, (len(lengths), length))
    ends = np.array(lengths)
    ids[np.arange(length) >= ends[:, None]] = PAD
    ids[:, 0] = BOS
    ids[np.arange(len(ends)), ends - 1] = EOS
    return ids.astype(np.int64), ends


def run(
    ids: Array,
    lengths: Array,
    mask: MaskSettings = MaskSettings(),  # noqa: B008 - frozen
    rows: Array | None = None,
    counts: Array | None = None,
    variant: int = 0,
    key: str = KEY,
    vocabulary: Vocabulary = VOCABULARY,
) -> MaskedRows:
    rows = np.arange(len(ids)) if rows is None else rows
    return mask_rows(key, rows, ids, lengths, vocabulary, mask, counts, variant)


def is_chosen(masked: MaskedRows) -> npt.NDArray[np.bool_]:
    """[B, L]: which positions were chosen."""
    chosen = np.zeros(masked.input_ids.shape, dtype=bool)
    row, slot = np.nonzero(masked.valid)
    chosen[row, masked.positions[row, slot]] = True
    return chosen


def near(count: float, total: int, share: float) -> bool:
    """Within five standard deviations of a binomial distribution."""
    return abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5


# ---- golden masks ------------------------------------------------------------------------------------------


def test_masks_are_frozen() -> None:
    """If this fails, masks changed and every cached target is stale: raise the schema of targets, then fix the test."""
    ids = np.array([[BOS, *range(100, 118), EOS], [BOS, *range(200, 209), EOS, *[PAD] * 9]])
    lengths = np.array([20, 11])
    uniform = run(ids, lengths, MaskSettings(seed=3, rate=0.3), rows=np.array([5, 2**33 + 1]), variant=2)
    assert uniform.positions.tolist() == GOLDEN_UNIFORM[0]
    assert uniform.labels.tolist() == GOLDEN_UNIFORM[1]
    assert np.take_along_axis(uniform.input_ids, uniform.positions, 1).tolist() == GOLDEN_UNIFORM[2]
    counts = np.arange(1000) ** 2
    smoothed = run(ids, lengths, MaskSettings(rate=0.3, kind="smoothed"), counts=counts)
    assert smoothed.positions.tolist() == GOLDEN_SMOOTHED[0]
    assert smoothed.labels.tolist() == GOLDEN_SMOOTHED[1]
    assert np.take_along_axis(smoothed.input_ids, smoothed.positions, 1).tolist() == GOLDEN_SMOOTHED[2]
    assert [digest.hex() for digest in row_digests(uniform.input_ids, lengths)] == GOLDEN_DIGESTS


# ---- properties of a mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "smoothed"])
@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_each_row_gets_the_mask_rate_and_nothing_else_changes(kind: str, rate: float) -> None:
    ids, lengths = blocks([64, 3, 40, 10, 64, 20] * 20, 64)
    ids[0, 5] = UNK
    before = ids.copy()
    masked = run(ids, lengths, MaskSettings(rate=rate, kind=kind), counts=np.arange(1000))
    assert (ids == before).all()
    assert masked.positions.shape == (120, -(-64 * rate // 1))
    chosen = is_chosen(masked)
    assert (chosen.sum(axis=1) == np.minimum(np.ceil(lengths * rate - 1e-9), lengths - 2)).all()
    assert not chosen[np.isin(ids, SPECIALS)].any()
    assert (masked.input_ids[~chosen] == ids[~chosen]).all()
    assert not np.isin(masked.input_ids[chosen], [BOS, PAD, EOS, UNK]).any()
    row, slot = np.nonzero(masked.valid)
    assert (masked.labels[row, slot] == ids[row, masked.positions[row, slot]]).all()
    assert (masked.labels[~masked.valid] == IGNORE_INDEX).all()
    assert (masked.positions[~masked.valid] == 0).all()
    for positions, valid in zip(masked.positions, masked.valid, strict=True):
        assert (np.diff(positions[valid]) > 0).all()


def test_integer_products_of_rate_and_length_are_not_rounded_up() -> None:
    # 0.07 x 100 is a little over 7 in binary.
    ids, lengths = blocks([100, 20], 100)
    assert run(ids, lengths, MaskSettings(rate=0.07)).valid.sum(axis=1).tolist() == [7, 2]
    assert run(ids, lengths, MaskSettings(rate=0.15)).valid.sum(axis=1).tolist() == [15, 3]


def test_rows_with_few_or_no_maskable_tokens() -> None:
    ids = np.array([[BOS, EOS, PAD, PAD, PAD, PAD, PAD, PAD], [BOS, UNK, UNK, 9, UNK, EOS, PAD, PAD]])
    masked = run(ids, np.array([2, 6]), MaskSettings(rate=0.5))
    assert masked.valid.sum(axis=1).tolist() == [0, 1]
    assert masked.positions[1, 0] == 3
    assert (masked.input_ids[0] == ids[0]).all()
    empty = run(ids[:0], np.array([], dtype=np.int64))
    assert empty.input_ids.shape == (0, 8)
    assert empty.positions.shape == (0, 2)


def test_a_row_does_not_depend_on_its_batch() -> None:
    ids, lengths = blocks([32, 20, 9, 32, 27] * 8, 32)
    rows = np.arange(1000, 1040)
    together = run(ids.astype(np.uint16), lengths.astype(np.int32), rows=rows)
    order = np.random.RandomState(1).permutation(40)
    shuffled = run(ids[order], lengths[order], rows=rows[order])
    for ours, theirs in zip(together, shuffled, strict=True):
        assert (ours[order] == theirs).all()
    alone = run(ids[17:18], lengths[17:18], rows=rows[17:18])
    assert all((ours[17:18] == theirs).all() for ours, theirs in zip(together, alone, strict=True))


def test_seed_blocks_variant_and_row_each_change_the_mask() -> None:
    ids, lengths = blocks([64] * 50, 64)
    masks = [
        run(ids, lengths),
        run(ids, lengths, MaskSettings(seed=1)),
        run(ids, lengths, variant=1),
        run(ids, lengths, key="cd" * 32),
        run(ids, lengths, rows=np.arange(50) + 50),
    ]
    for index, first in enumerate(masks):
        for second in masks[:index]:
            common = (is_chosen(first) & is_chosen(second)).sum()
            assert common < 0.4 * is_chosen(first).sum()  # independent masks share 15 %


def test_smoothed_masks_need_counts() -> None:
    ids, lengths = blocks([16], 16)
    with pytest.raises(ValueError, match="counts"):
        run(ids, lengths, MaskSettings(kind="smoothed"))


# ---- distribution ----------------------------------------------------------------------------------------------


def test_uniform_masks_choose_every_position_equally_often() -> None:
    ids, lengths = blocks([66] * 4000, 66)
    hits = is_chosen(run(ids, lengths)).sum(axis=0)
    assert hits[0] == hits[65] == 0
    assert hits.sum() == 4000 * 10
    assert all(near(count, 4000, 10 / 64) for count in hits[1:65])


def test_chosen_tokens_are_replaced_80_10_10() -> None:
    size = 50
    ids, lengths = blocks([130] * 3000, 130, size=size)
    masked = run(ids, lengths, vocabulary=vocabulary_of(size))
    new = np.take_along_axis(masked.input_ids, masked.positions, 1)
    total = new.size
    ordinary = size - len(SPECIALS)
    assert total == 3000 * 20
    assert near((new == MASK).sum(), total, 0.8)
    assert near((new == masked.labels).sum(), total, 0.1 + 0.1 / ordinary)
    drawn = new[(new != MASK) & (new != masked.labels)]
    histogram = np.bincount(drawn, minlength=size)
    assert histogram[list(SPECIALS)].sum() == 0
    assert all(near(count, len(drawn), 1 / ordinary) for count in histogram[5:])


def test_smoothed_masks_draw_with_weight_count_to_the_minus_0_7() -> None:
    """With one position per row, the probability of each is exactly its weight over the sum of weights."""
    counts = np.zeros(1000, dtype=np.int64)
    counts[10:15] = [0, 1, 10, 100, 10_000]
    ids = np.tile([BOS, 10, 11, 12, EOS, 13, 14, PAD], (20_000, 1))
    masked = run(ids, np.full(20_000, 7), MaskSettings(rate=0.1, kind="smoothed"), counts=counts)
    hits = is_chosen(masked).sum(axis=0)
    weights = np.array([0, 1, 1, 10**-0.7, 0, 100**-0.7, 10_000**-0.7, 0])
    assert hits.sum() == 20_000
    assert all(
        near(count, 20_000, weight / weights.sum()) for count, weight in zip(hits, weights, strict=True) if weight
    )
    assert hits[[0, 4, 7]].sum() == 0


# ---- digests -----------------------------------------------------------------------------------------------


def test_digests_identify_the_attended_input() -> None:
    ids, lengths = blocks([8, 5, 8], 8)
    digests = row_digests(ids, lengths)
    assert len(set(digests)) == 3
    assert {len(digest) for digest in digests} == {8}
    changed = ids.copy()
    changed[1, 6] = 99  # padding of row 1, not attended
    assert row_digests(changed, lengths) == digests
    assert row_digests(ids.astype(np.uint16), lengths.astype(np.int32)) == digests
    changed[1, 2] += 1
    assert row_digests(changed, lengths)[1] != digests[1]
    assert row_digests(ids, lengths - 1)[0] != digests[0]
