"""Intervals against scipy, a bootstrap loop without vectorization, and samples of known spread."""

import numpy as np
import pytest
from scipy import stats

from tasks.eval import intervals
from tasks.eval.intervals import over_seeds, paired_difference, quotients, summarize_seeds


def correct(*rates, rows=400, seed=0):
    """Row counts [S, N, 2] of models with these accuracies, one per seed."""
    draw = np.random.default_rng(seed)
    hits = np.stack([draw.random(rows) < rate for rate in rates]).astype(float)
    return np.stack([hits, np.ones_like(hits)], axis=-1)


def test_interval_over_seeds_is_students_t():
    values = [0.71, 0.74, 0.72]
    found = over_seeds(values)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert over_seeds([0.5]) == {"mean": 0.5, "seeds": 1}


def test_summaries_cover_any_depth_and_leave_out_other_values():
    runs = [{"entity": {"f1": value}, "rows": 10, "note": "x", "odd": 1} for value in (0.2, 0.4, 0.9)]
    del runs[1]["odd"]
    summary = summarize_seeds(runs)
    assert summary["entity"]["f1"]["mean"] == pytest.approx(0.5)
    assert summary["rows"] == {"mean": 10, "sd": 0, "seeds": 3, "low": 10, "high": 10}
    assert set(summary) == {"entity", "rows"}


def test_bootstrap_equals_a_loop():
    ours, theirs = correct(0.7, 0.75, seed=1), correct(0.8, 0.85, seed=2)
    found = paired_difference(ours, theirs)
    draw = np.random.default_rng(intervals.SEED)
    ratios = []
    for start in range(0, intervals.DRAWS, intervals.CHUNK):
        for rows in draw.integers(400, size=(min(intervals.CHUNK, intervals.DRAWS - start), 400)):
            own, other = (quotients(side[:, rows].sum(axis=1)).mean() for side in (ours, theirs))
            ratios.append(own / other)
    low, high = np.percentile(ratios, (2.5, 97.5))
    assert (found["ratio"]["rows_low"], found["ratio"]["rows_high"]) == pytest.approx((low, high))
    own, other = quotients(ours.sum(axis=1)), quotients(theirs.sum(axis=1))
    assert found["ratio"]["value"] == pytest.approx(own.mean() / other.mean())
    assert found["difference"]["value"] == pytest.approx(own.mean() - other.mean())
    by_seed = over_seeds(list(own / other))
    assert found["ratio"]["seeds_low"] == pytest.approx(by_seed["low"])
    assert found["ratio"]["low"] == pytest.approx(min(low, by_seed["low"]))
    assert found == paired_difference(ours, theirs)


def test_pairing_narrows_the_interval():
    """Two models with errors on the same rows have a significant difference; independent errors widen the interval."""
    theirs = correct(0.8, rows=1000)
    ours = theirs.copy()
    ours[0, np.flatnonzero(ours[0, :, 0])[:20], 0] = 0
    paired = paired_difference(ours, theirs)["difference"]
    independent = paired_difference(correct(0.78, rows=1000, seed=9), theirs)["difference"]
    assert paired["rows_high"] < 0
    assert paired["rows_high"] - paired["rows_low"] < 0.5 * (independent["rows_high"] - independent["rows_low"])
    assert "seeds_low" not in paired


def test_width_equals_the_binomial_one():
    """The difference to a model that is always correct is binomial."""
    ours, theirs = correct(0.7, rows=2000), correct(1.1, rows=2000)
    found = paired_difference(ours, theirs)["difference"]
    rate = ours[0, :, 0].mean()
    expected = 2 * 1.96 * np.sqrt(rate * (1 - rate) / 2000)
    assert found["rows_high"] - found["rows_low"] == pytest.approx(expected, rel=0.1)


def test_ratio_to_zero_is_left_out_and_that_of_equal_models_is_one():
    zero = correct(0.0)
    assert "ratio" not in paired_difference(correct(0.5), zero)
    same = paired_difference(correct(0.5, 0.6), correct(0.5, 0.6))["ratio"]
    assert (same["value"], same["low"], same["high"]) == (1, 1, 1)
