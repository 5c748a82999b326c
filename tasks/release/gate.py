"""The gate before promotion: may a candidate become champion, set by set, and why.

    verdict = judge(candidate, champions, recipe.gate)     # standings of the candidate, and of each champion so far
    verdict.promote, verdict.reasons, verdict.rows

The best so far on a set is the best mean of any champion. A candidate may not fall by more than a tolerance below it on
any set, so that many small steps down do not add up; and its mean over the sets may not fall by more than one
standard error below that of any champion with the same sets. Called by flows/promote.py; knows no registry.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tasks.recipe.config import GateSettings
from tasks.release.results import SetResult

MEAN = "mean"
"""Stands in the place of a set in the row of the mean."""

SetResults = Sequence[SetResult]


@dataclass(frozen=True)
class Row:
    """One set: the means that are compared, and by how much the first may be below the second.

    `best` is None where nothing is compared with, `candidate` None where there is no figure. `note` is the sentence.
    """

    set_name: str
    metric: str
    candidate: float | None
    best: float | None
    tolerance: float | None
    passed: bool
    note: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may become champion; `reasons` are what speaks against it, or else what speaks for it."""

    promote: bool
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]


def judge(candidate: SetResults, champions: Sequence[SetResults], rules: GateSettings) -> Verdict:
    """Judges a candidate against the champions so far (oldest first, the present one last), all by one protocol.

    Without a champion the floors decide, as they do on a set that no champion has. A set that was not run blocks
    unless `rules.optional` names it, and so does a champion's standing without values: it cannot be compared with.
    """
    by_name = {standing.set_name: standing for standing in candidate}
    past = [{standing.set_name: standing for standing in one} for one in champions]
    names = dict.fromkeys([*by_name, *rules.needed, *(name for one in past for name in one)])
    rows = [_set_row(by_name.get(name, SetResult(name, "")), past, rules) for name in names]
    ran = {name: standing for name, standing in by_name.items() if standing.was_run}
    rows += _mean_rows(ran, [{name: one[name] for name in one if one[name].was_run} for one in past], rules)
    against = tuple(row.note for row in rows if not row.passed)
    if not ran:
        against = (*against, "not one set was run")
    return Verdict(not against, against or tuple(row.note for row in rows), tuple(rows))


def tolerance(candidate: SetResult, best: SetResult, rules: GateSettings) -> float:
    """How far the candidate may be below the best: so many pooled standard deviations over seeds, or the least one.

    With one seed on both sides the spread is unknown, and the least tolerance is all there is.
    """
    return max(rules.deviations * pooled_sd(candidate, best), rules.min_tolerance)


def pooled_sd(one: SetResult, other: SetResult) -> float:
    """Standard deviation over seeds that both are taken to share; 0 where neither has two seeds."""
    freedom = len(one.values) + len(other.values) - 2
    if freedom == 0:
        return 0.0
    squares = sum((len(each.values) - 1) * each.sd**2 for each in (one, other))
    return math.sqrt(squares / freedom)


def _set_row(candidate: SetResult, past: Sequence[Mapping[str, SetResult]], rules: GateSettings) -> Row:
    name = candidate.set_name
    if not candidate.was_run:
        return _missing_row(candidate, rules)
    known = [one[name] for one in past if name in one]
    rivals = [standing for standing in known if standing.was_run]
    if len(rivals) < len(known):
        (reason, *_) = (standing.reason for standing in known if not standing.was_run)
        optional = name in rules.optional
        return Row(name, candidate.metric, candidate.mean, None, None, optional, f"{name} cannot be compared: {reason}")
    if not rivals:
        return _floor_row(candidate, rules, first=not past)
    best = max(rivals, key=lambda standing: standing.mean)
    allowed = tolerance(candidate, best, rules)
    fall = best.mean - candidate.mean
    note = f"{name} {_moved(best.mean, candidate.mean)}"
    if fall > 0:
        spread = f"{rules.deviations:g} standard deviations over seeds"
        source = spread if allowed > rules.min_tolerance else "gate.min_tolerance"
        note += f", {'within' if fall <= allowed else 'more than'} its tolerance of {allowed:.4f} ({source})"
    return Row(name, candidate.metric, candidate.mean, best.mean, allowed, fall <= allowed, note)


def _missing_row(candidate: SetResult, rules: GateSettings) -> Row:
    name, optional = candidate.set_name, candidate.set_name in rules.optional
    reason = candidate.reason or "there is no score of it"
    note = f"{name} was not run: {reason}; " + (
        "gate.optional allows it" if optional else "a missing score blocks promotion unless gate.optional names the set"
    )
    return Row(name, candidate.metric, None, None, None, optional, note)


def _floor_row(candidate: SetResult, rules: GateSettings, *, first: bool) -> Row:
    name, mean = candidate.set_name, candidate.mean
    why = "there is no champion yet" if first else "no champion has this set"
    floor = rules.floors.get(name)
    if floor is None:
        return Row(name, candidate.metric, mean, None, None, True, f"{name} is {mean:.4f}; {why}, no floor is set")
    note = f"{name} is {mean:.4f}, {'below' if mean < floor else 'at or above'} its floor {floor}; {why}"
    return Row(name, candidate.metric, mean, None, None, mean >= floor, note)


def _mean_rows(
    candidate: Mapping[str, SetResult], past: Sequence[Mapping[str, SetResult]], rules: GateSettings
) -> Iterator[Row]:
    """The mean over sets against the champion that it is worst against; none where nothing can be compared."""
    shared = [name for name in candidate if any(name in one for one in past)]
    rivals = [one for one in past if set(shared) <= set(one)] or past[-1:]
    pairs = [[(candidate[name], rival[name]) for name in shared if name in rival] for rival in rivals]
    falls = [(*_mean_fall(each, rules), each) for each in pairs if each]
    if not falls:
        return
    fall, error, worst = max(falls, key=lambda one: one[0] - one[1])
    mean, best = (fmean(standing.mean for standing in side) for side in zip(*worst, strict=True))
    note = f"the mean over sets {_moved(best, mean)}"
    if fall > 0:
        note += f", {'within' if fall <= error else 'more than'} one standard error ({error:.4f})"
    yield Row(MEAN, "", mean, best, error, fall <= error, note)


def _mean_fall(pairs: Sequence[tuple[SetResult, SetResult]], rules: GateSettings) -> tuple[float, float]:
    """By how much the candidate's mean over sets lies below the other's, and the standard error of that difference.

    A spread over seeds that is unknown is taken as what the tolerance stands for.
    """
    fall = fmean(other.mean for _, other in pairs) - fmean(one.mean for one, _ in pairs)
    variances = [
        (tolerance(one, other, rules) / rules.deviations) ** 2 * (1 / len(one.values) + 1 / len(other.values))
        for one, other in pairs
    ]
    return fall, math.sqrt(sum(variances)) / len(pairs)


def _moved(before: float, now: float) -> str:
    if now == before:
        return f"is {now:.4f}, equal to the best so far"
    verb = "rose" if now > before else "fell"
    return f"{verb} by {abs(now - before):.4f}, from {before:.4f} to {now:.4f}"
