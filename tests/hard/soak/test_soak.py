"""Runs the soak test (soak.py) eight times, and checks the rule that distinguishes growth from noise."""

from pathlib import Path

import pytest

from tests.hard.soak.growth import BOUNDS, Sample, grown, growth, verdict


@pytest.mark.guard
@pytest.mark.slow
def test_no_resource_grows_over_eight_runs(tmp_path: Path) -> None:
    # Deferred: it imports MLflow, which takes seconds and which the other tests here do not need.
    from tests.hard.soak.soak import soak, soaking

    with soaking(tmp_path) as made:
        samples = list(soak(made, runs=8))
        left = made.retention()
    assert not grown(samples), verdict(samples)
    assert not left


def samples_of(name: str, values: list[float]) -> list[Sample]:
    """Makes samples in which all measurements except one are constant."""
    flat = dict.fromkeys(BOUNDS, 100.0)
    return [Sample(number, "prepare", 1.0, flat | {name: value}) for number, value in enumerate(values, start=1)]


def test_growth_is_a_run_and_the_first_third_does_not_count() -> None:
    assert growth([0.0, 50.0, 100.0, 100.0, 100.5, 101.0, 101.5, 102.0, 102.5]) == pytest.approx(0.5)
    assert growth([7.0]) == 0.0


@pytest.mark.parametrize("name", BOUNDS)
def test_what_grows_twice_as_fast_as_it_may_is_named_and_nothing_else(name: str) -> None:
    steps = [100.0 + 2 * BOUNDS[name].allowed(20) * number for number in range(30)]
    assert list(grown(samples_of(name, steps))) == [name]
    assert verdict(samples_of(name, steps)).count("GREW") == 1


def test_one_open_file_that_each_chain_leaves_is_found() -> None:
    assert "files" in grown(samples_of("files", [float(number // 10) for number in range(50)]))


def test_what_may_come_once_may_come_in_the_middle_and_no_more_of_it() -> None:
    step = BOUNDS["server memory"].once
    assert not grown(samples_of("server memory", [100.0] * 15 + [100.0 + step] * 10))
    assert grown(samples_of("server memory", [100.0] * 15 + [100.0 + 3 * step] * 10))


def test_a_file_open_for_a_moment_is_no_growth() -> None:
    values = [100.0] * 30
    values[24] = 101.0
    assert not grown(samples_of("files", values))
