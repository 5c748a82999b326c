"""A spread of the crash matrix (crash.py) over all kinds of points, as far as four minutes go."""

from pathlib import Path

import pytest

from tests.hard.crash import kind_of, matrix, spread, told, visit


@pytest.mark.crash
def test_a_chain_killed_at_its_points_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    with matrix(tmp_path) as made:
        lives = list(visit(made, spread(made.points, 14), moments=2, seed=8, limit=150))
    assert not [told(life) for life in lives if life.faults]
    assert sum(life.struck for life in lives) >= 4, "hardly any was killed where it was to be"


def test_a_spread_takes_every_kind_before_it_takes_one_twice() -> None:
    points = [f"before fsync data/{kind}/*/{name} #{time}" for kind in "abc" for name in "xy" for time in (1, 2)]
    assert {kind_of(point) for point in points} == {f"before fsync data/{kind}/*" for kind in "abc"}
    assert len({kind_of(point) for point in spread(points, 3)}) == 3
    assert sorted(spread(points, 12)) == sorted(points)
