"""Kills a pipeline at five crash points and one random time; matrix.py visits the other crash points."""

from pathlib import Path

import pytest

from tests.hard.crash.matrix import kind_of, line_of, matrix, run_trials, spread


@pytest.mark.guard
@pytest.mark.slow
def test_a_chain_killed_at_its_points_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    with matrix(tmp_path) as inputs:
        trials = list(run_trials(inputs, spread(inputs.points, 5), moments=1, seed=8))
    assert not [line_of(trial) for trial in trials if trial.faults]
    assert sum(trial.killed for trial in trials) >= 4, "most runs ended before they reached their crash point"


def test_a_spread_takes_every_kind_before_it_takes_one_twice() -> None:
    points = [f"before fsync data/{kind}/*/{name} #{time}" for kind in "abc" for name in "xy" for time in (1, 2)]
    assert {kind_of(point) for point in points} == {f"before fsync data/{kind}/*" for kind in "abc"}
    assert len({kind_of(point) for point in spread(points, 3)}) == 3
    assert sorted(spread(points, 12)) == sorted(points)
