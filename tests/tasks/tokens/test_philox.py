"""Philox4x32-10: the published answers, and separate words for every row and stream."""

import numpy as np
import pytest

from tasks.tokens.philox import philox4x32, random_words


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """Known answers of Philox4x32-10 as published with Random123 (file kat_vectors)."""
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), key)) == words


def test_every_row_and_stream_has_its_own_words() -> None:
    rows = np.array([0, 1, 2**32, 2**32 + 1])
    words = np.concatenate([random_words((1, 2), rows, stream, 6) for stream in (0, 1)])
    assert words.shape == (8, 6)
    assert len(np.unique(words)) == 48
    assert words.max() < 2**32
    assert (random_words((1, 2), rows, 0, 5) == words[:4, :5]).all()
