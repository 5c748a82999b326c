"""Decides whether a candidate model may become champion from its results on each set, and explains the decision.

    verdict = promotion_verdict(candidate, champions, recipe.gate)     # results of the candidate and of each champion
    verdict.promote, verdict.reasons, verdict.rows

On each set, the candidate is compared with the best mean of any champion so far, present or past, and may be below it
by at most a tolerance; the comparison with the best mean so far prevents small losses from accumulating. The
candidate's mean over the sets may be below the mean of any champion with the same sets by at most one standard error.
This module neither reads nor writes the model registry.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tasks.recipe.config import GateSettings
from tasks.release.results import SetResult

MEAN = "mean"
"""Used instead of a set name in the row of the mean over sets."""

SetResults = Sequence[SetResult]


@dataclass(frozen=True)
class VerdictRow:
    """Comparison on one set: both means, and by how much the candidate may be below the best mean.

    `best` and `tolerance` are None if the candidate was compared with no champion; `candidate` is None if the set was
    not run. `note` is the result of the comparison as text.
    """

    set_name: str
    metric: str
    candidate: float | None
    best: float | None
    tolerance: float | None
    passed: bool
    note: str

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Result of the promotion rule: `promote` is True if the candidate may become champion.

    `reasons` are the notes of the failed rows, or of all rows if none failed.
    """

    promote: bool
    reasons: tuple[str, ...]
    rows: tuple[VerdictRow, ...]


def promotion_verdict(candidate: SetResults, champions: Sequence[SetResults], rules: GateSettings) -> Verdict:
    """Compares a candidate with the champions so far (oldest first, the present one last), all scored by one protocol.

    The floors of `rules` apply to sets that no champion has, and to all sets if no champion exists. A set that was not
    run, or cannot be compared because a champion's result has no values, blocks the promotion unless it is in
    `rules.optional`.
    """
    by_name = {result.set_name: result for result in candidate}
    champion_results = [{result.set_name: result for result in champion} for champion in champions]
    names = dict.fromkeys([*by_name, *rules.needed, *(name for results in champion_results for name in results)])
    rows = [_verdict_row(by_name.get(name, SetResult(name, "")), champion_results, rules) for name in names]
    with_values = {name: result for name, result in by_name.items() if result.was_run}
    comparable = [{name: one[name] for name in one if one[name].was_run} for one in champion_results]
    rows += _mean_rows(with_values, comparable, rules)
    objections = tuple(row.note for row in rows if not row.passed)
    if not with_values:
        objections = (*objections, "no set was run")
    return Verdict(not objections, objections or tuple(row.note for row in rows), tuple(rows))


def tolerance(candidate: SetResult, best: SetResult, rules: GateSettings) -> float:
    """Returns the allowed loss: `rules.deviations` pooled standard deviations, but at least `rules.min_tolerance`.

    With one seed on both sides, the standard deviation is unknown and the minimum applies.
    """
    return max(rules.deviations * pooled_sd(candidate, best), rules.min_tolerance)


def pooled_sd(one: SetResult, other: SetResult) -> float:
    """Returns the pooled standard deviation over seeds, assuming equal variances; 0 if neither side has two seeds."""
    freedom = len(one.values) + len(other.values) - 2
    if freedom == 0:
        return 0.0
    squares = sum((len(each.values) - 1) * each.sd**2 for each in (one, other))
    return math.sqrt(squares / freedom)


# ---- one set -----------------------------------------------------------------------------------------------


def _verdict_row(candidate: SetResult, champions: Sequence[Mapping[str, SetResult]], rules: GateSettings) -> VerdictRow:
    name, metric = candidate.set_name, candidate.metric
    if not candidate.was_run:
        return _not_run_row(candidate, rules)
    on_this_set = [results[name] for results in champions if name in results]
    without_values = [result for result in on_this_set if not result.was_run]
    if without_values:
        note = f"{name} cannot be compared: {without_values[0].reason}"
        return VerdictRow(name, metric, candidate.mean, None, None, name in rules.optional, note)
    if not on_this_set:
        return _floor_row(candidate, rules, first=not champions)
    best = max(on_this_set, key=lambda result: result.mean)
    allowed = tolerance(candidate, best, rules)
    loss = best.mean - candidate.mean
    note = f"{name} {_change(best.mean, candidate.mean)}"
    if loss > 0:
        deviations = f"{rules.deviations:g} standard deviations over seeds"
        source = deviations if allowed > rules.min_tolerance else "gate.min_tolerance"
        note += f", {'within' if loss <= allowed else 'more than'} its tolerance of {allowed:.4f} ({source})"
    return VerdictRow(name, metric, candidate.mean, best.mean, allowed, loss <= allowed, note)


def _not_run_row(candidate: SetResult, rules: GateSettings) -> VerdictRow:
    name, optional = candidate.set_name, candidate.set_name in rules.optional
    reason = candidate.reason or "the model has no score on it"
    note = f"{name} was not run: {reason}; " + (
        "gate.optional allows it" if optional else "a missing score blocks promotion unless gate.optional names the set"
    )
    return VerdictRow(name, candidate.metric, None, None, None, optional, note)


def _floor_row(candidate: SetResult, rules: GateSettings, *, first: bool) -> VerdictRow:
    """Returns the row of a set that no champion has; `first` is True if no champion exists."""
    name, mean = candidate.set_name, candidate.mean
    why = "no champion exists yet" if first else "no champion has this set"
    floor = rules.floors.get(name)
    if floor is None:
        note = f"{name} is {mean:.4f}; {why}, no floor is set"
        return VerdictRow(name, candidate.metric, mean, None, None, True, note)
    note = f"{name} is {mean:.4f}, {'below' if mean < floor else 'at or above'} its floor {floor}; {why}"
    return VerdictRow(name, candidate.metric, mean, None, None, mean >= floor, note)


# ---- the mean over sets ------------------------------------------------------------------------------------


def _mean_rows(
    candidate: Mapping[str, SetResult], champions: Sequence[Mapping[str, SetResult]], rules: GateSettings
) -> Iterator[VerdictRow]:
    """Yields the row of the mean, compared with the champion furthest ahead; yields nothing without shared sets."""
    shared = [name for name in candidate if any(name in results for results in champions)]
    complete = [results for results in champions if set(shared) <= set(results)] or champions[-1:]
    pairings = [[(candidate[name], results[name]) for name in shared if name in results] for results in complete]
    losses = [(*_mean_loss(pairs, rules), pairs) for pairs in pairings if pairs]
    if not losses:
        return
    loss, error, pairs = max(losses, key=lambda one: one[0] - one[1])
    mean, best = (fmean(result.mean for result in side) for side in zip(*pairs, strict=True))
    note = f"the mean over sets {_change(best, mean)}"
    if loss > 0:
        note += f", {'within' if loss <= error else 'more than'} one standard error ({error:.4f})"
    yield VerdictRow(MEAN, "", mean, best, error, loss <= error, note)


def _mean_loss(pairs: Sequence[tuple[SetResult, SetResult]], rules: GateSettings) -> tuple[float, float]:
    """Returns the champion's mean over sets minus the candidate's, and the standard error of that difference.

    The standard deviation on a set is estimated as its tolerance / `rules.deviations`, also if it is unknown.
    """
    loss = fmean(other.mean for _, other in pairs) - fmean(one.mean for one, _ in pairs)
    variances = [
        (tolerance(one, other, rules) / rules.deviations) ** 2 * (1 / len(one.values) + 1 / len(other.values))
        for one, other in pairs
    ]
    return loss, math.sqrt(sum(variances)) / len(pairs)


def _change(before: float, now: float) -> str:
    if now == before:
        return f"is {now:.4f}, equal to the best so far"
    verb = "rose" if now > before else "fell"
    return f"{verb} by {abs(now - before):.4f}, from {before:.4f} to {now:.4f}"
