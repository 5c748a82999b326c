"""How sure a figure is: over the seeds of fine-tuning by Student's t, over test rows by a paired bootstrap.

    summarise([{"accuracy": 0.71}, {"accuracy": 0.73}, {"accuracy": 0.72}])     # mean, sd, low, high, seeds
    against(ours, theirs)                                                       # ratio and difference of two models

Intervals hold 95 %. Three seeds say little about their spread, which is why t (4.3 standard errors at three seeds) and
not 1.96 is used. The seeds do not vary the test rows, and the bootstrap does not vary the seeds: a comparison gives
both intervals and, as `low` and `high`, the hull of the two.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as students_t

CONFIDENCE = 0.95

NORMAL = 1.96
"""Standard errors in half an interval of a mean over many rows or blocks."""

DRAWS = 2000

SEED = 2_205_111

CHUNK = 64
"""Draws whose row counts exist at once: 64 of 13,410 rows are 7 MB."""

Array = npt.NDArray[np.float64]


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "seeds"} and, from two seeds on, "sd" (n - 1) and "low", "high": the 95 % interval by Student's t."""
    found = {"mean": fmean(values), "seeds": len(values)}
    if len(values) > 1:
        sd = stdev(values)
        half = float(students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
        found |= {"sd": sd, "low": found["mean"] - half, "high": found["mean"] + half}
    return found


def summarize_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of several seeds, name by name and at any depth, each as `over_seeds` gives it.

    What is no number in the first run is left out, and so is what not every run has.
    """
    summary: dict[str, Any] = {}
    for name, first in runs[0].items():
        if any(name not in run for run in runs):
            continue
        values = [run[name] for run in runs]
        if isinstance(first, Mapping):
            summary[name] = summarize_seeds(values)
        elif isinstance(first, int | float) and not isinstance(first, bool):
            summary[name] = over_seeds(values)
    return summary


def paired_difference(ours: Array, theirs: Array) -> dict[str, dict[str, float]]:
    """Ratio and difference of two models' scores on the same test rows.

    `ours` [S, N, 2] and `theirs` [R, N, 2] are `tasks.metric.row_counts` by seed; a model's score is the mean over its
    seeds. Each of "ratio" and "difference" has `value`; `rows_low`, `rows_high` by a paired bootstrap (percentiles of
    2,000 draws of the test rows, the same rows for both models and all seeds, always the same draws); with as many
    seeds on both sides `seeds_low`, `seeds_high` by Student's t over the values seed by seed; `low`, `high`, the hull.
    A ratio to a score of 0 is left out.
    """
    drawn = _drawn(ours, theirs)
    by_seed = [ratio_interval(side.sum(axis=1)) for side in (ours, theirs)]
    own, other = (float(values.mean()) for values in by_seed)
    paired = by_seed[0], by_seed[1]
    found = {"difference": _both(own - other, drawn[:, 0] - drawn[:, 1], _by_seed(np.subtract, *paired))}
    if other > 0 and (drawn[:, 1] > 0).all():
        found["ratio"] = _both(own / other, drawn[:, 0] / drawn[:, 1], _by_seed(np.divide, *paired))
    return found


def ratio_interval(sums: Array) -> Array:
    """First over second of the last axis; 0 where the second is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def _drawn(ours: Array, theirs: Array) -> Array:
    """Scores of both models in every draw [DRAWS, 2]."""
    rows = ours.shape[1]
    columns = np.concatenate([side.transpose(1, 0, 2).reshape(rows, -1) for side in (ours, theirs)], axis=1)
    random = np.random.default_rng(SEED)
    scores = []
    for start in range(0, DRAWS, CHUNK):
        size = min(CHUNK, DRAWS - start)
        picked = random.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        times = np.bincount(picked.ravel(), minlength=size * rows).reshape(size, rows)
        sums = ratio_interval((times @ columns).reshape(size, -1, 2))
        scores.append(np.stack([sums[:, : len(ours)].mean(axis=1), sums[:, len(ours) :].mean(axis=1)], axis=1))
    return np.concatenate(scores)


def _by_seed(operation: np.ufunc, ours: Array, theirs: Array) -> list[float]:
    """Values seed by seed; none where the models have not as many seeds, or a score to divide by is 0."""
    if len(ours) != len(theirs) or len(ours) < 2 or (operation is np.divide and (theirs == 0).any()):
        return []
    return [float(value) for value in operation(ours, theirs)]


def _both(value: float, drawn: Array, by_seed: Sequence[float]) -> dict[str, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.percentile(drawn, (tail, 100 - tail)))
    found = {"value": value, "rows_low": low, "rows_high": high, "low": low, "high": high}
    if by_seed:
        seeds = over_seeds(by_seed)
        found |= {"seeds_low": seeds["low"], "seeds_high": seeds["high"]}
        found |= {"low": min(low, seeds["low"]), "high": max(high, seeds["high"])}
    return found
