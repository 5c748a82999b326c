"""Computes 95 % confidence intervals: Student's t over fine-tuning seeds, and a paired bootstrap over test rows.

    summarize_seeds([{"accuracy": 0.71}, {"accuracy": 0.73}, {"accuracy": 0.72}])   # mean, sd, low, high, seeds
    paired_difference(ours, theirs)                                                 # ratio and difference of two models

A standard deviation from a few seeds is uncertain, so the interval over seeds uses Student's t (4.3 standard errors at
three seeds) instead of 1.96. Seeds share the test rows, and the bootstrap keeps the seeds fixed, so a comparison
reports both intervals and, as `low` and `high`, the smallest interval that contains both.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as students_t

CONFIDENCE = 0.95

Z_95 = 1.96
"""Half the width of a 95 % normal interval in standard errors, for means over many rows or blocks."""

DRAWS = 2000
"""Bootstrap samples."""

SEED = 2_205_111

CHUNK = 64
"""Bootstrap samples in memory at once: 64 samples of 13,410 rows take 7 MB."""

Array = npt.NDArray[np.float64]


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Summarizes one value per seed.

    Returns "mean" and "seeds" (their number); with two or more seeds also "sd" (sample standard deviation) and "low",
    "high" (95 % interval by Student's t).
    """
    summary = {"mean": fmean(values), "seeds": len(values)}
    if len(values) > 1:
        sd = stdev(values)
        half = float(students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
        summary |= {"sd": sd, "low": summary["mean"] - half, "high": summary["mean"] + half}
    return summary


def summarize_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Applies `over_seeds` to each figure of several runs (one run per seed), at any depth of nesting.

    Omits values that are not numbers and figures that are missing in any run.
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
    """Returns the ratio and difference of the scores of two models on the same test rows, with 95 % intervals.

    `ours` [S, N, 2] and `theirs` [R, N, 2] contain the numerator and denominator of the metric by seed and test row
    (see `row_counts`); a model's score is the mean over its seeds. "ratio" and "difference" each contain

    value                   the point estimate
    rows_low, rows_high     a paired percentile bootstrap over test rows: 2,000 samples from a fixed seed, the same rows
                            for both models and all seeds
    seeds_low, seeds_high   Student's t over the values seed by seed; absent unless both models have the same number of
                            seeds, at least two
    low, high               the smallest interval that contains both

    "ratio" is absent if the score of `theirs` is 0, in the data or in a bootstrap sample.
    """
    sampled = _bootstrap(ours, theirs)
    by_seed = [quotients(side.sum(axis=1)) for side in (ours, theirs)]
    own, other = (float(values.mean()) for values in by_seed)
    paired = by_seed[0], by_seed[1]
    result = {"difference": _intervals(own - other, sampled[:, 0] - sampled[:, 1], _by_seed(np.subtract, *paired))}
    if other > 0 and (sampled[:, 1] > 0).all():
        result["ratio"] = _intervals(own / other, sampled[:, 0] / sampled[:, 1], _by_seed(np.divide, *paired))
    return result


def quotients(sums: Array) -> Array:
    """Divides the two entries of the last axis, [..., 2] to [...]; the quotient is 0 where the divisor is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def _bootstrap(ours: Array, theirs: Array) -> Array:
    """Returns the scores of both models in each bootstrap sample: [DRAWS, 2]."""
    rows = ours.shape[1]
    columns = np.concatenate([side.transpose(1, 0, 2).reshape(rows, -1) for side in (ours, theirs)], axis=1)
    random = np.random.default_rng(SEED)
    scores = []
    for start in range(0, DRAWS, CHUNK):
        size = min(CHUNK, DRAWS - start)
        picked = random.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        times = np.bincount(picked.ravel(), minlength=size * rows).reshape(size, rows)
        sums = quotients((times @ columns).reshape(size, -1, 2))
        scores.append(np.stack([sums[:, : len(ours)].mean(axis=1), sums[:, len(ours) :].mean(axis=1)], axis=1))
    return np.concatenate(scores)


def _by_seed(operation: np.ufunc, ours: Array, theirs: Array) -> list[float]:
    """Applies the operation seed by seed.

    Returns an empty list if the models have different numbers of seeds or only one, or if a divisor is 0.
    """
    if len(ours) != len(theirs) or len(ours) < 2 or (operation is np.divide and (theirs == 0).any()):
        return []
    return [float(value) for value in operation(ours, theirs)]


def _intervals(value: float, sampled: Array, by_seed: Sequence[float]) -> dict[str, float]:
    """Returns the point estimate, its intervals over test rows and over seeds, and the hull of both intervals."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.percentile(sampled, (tail, 100 - tail)))
    result = {"value": value, "rows_low": low, "rows_high": high, "low": low, "high": high}
    if by_seed:
        seeds = over_seeds(by_seed)
        result |= {"seeds_low": seeds["low"], "seeds_high": seeds["high"]}
        result |= {"low": min(low, seeds["low"]), "high": max(high, seeds["high"])}
    return result
