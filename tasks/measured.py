"""One model among those that are compared: its standings, its size, its speed. What card and picture are made from.

Measured("student", standings, parameters=68_128_261, size=272_513_044, milliseconds={1: 43.4, 32: 1302.0})
measured_models(scores)     # of all models, from their scores
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.interval import NORMAL, over_seeds
from tasks.standing import Standing, standings, teachers_own

TEACHER = "teacher"
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """`parameters` with the LM head, `size` in bytes of weight files, `milliseconds` of one forward on the CPU by batch
    size; 0 and empty where nobody measured. `ratios`: by set `value`, `low`, `high` of its score to its teacher's."""

    name: str
    standings: tuple[Standing, ...] = ()
    parameters: int = 0
    size: int = 0
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def standing(self, set_name: str) -> Standing | None:
        """Its standing on a set if it was run there, else None."""
        return next((one for one in self.standings if one.set_name == set_name and one.was_run), None)


def measured_models(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[Measured, ...]:
    """All models of a comparison (model -> set -> figures): the first, its teacher where one was measured, the others.

    Size and speed of all stand among the scores of the first.
    """
    first = next(iter(scores))
    speed = scores[first].get("size-and-speed", {})
    found = {name: _measured(name, own, speed) for name, own in scores.items()}
    if TEACHER not in found:
        own = teachers_own(scores[first].get("heldout", {}))
        if own or TEACHER in speed.get("parameters", {}):
            found[TEACHER] = _measured(TEACHER, {"heldout": own} if own else {}, speed)
    order = dict.fromkeys([first, *([TEACHER] if TEACHER in found else []), *found])
    return tuple(found[name] for name in order)


def _measured(name: str, scores: Mapping[str, Scores], speed: Scores) -> Measured:
    times = speed.get("latency", {}).get("ms", {}).get(name, {})
    ratios = {part: figures.get("against_teacher", {}).get("ratio") for part, figures in scores.items()}
    return Measured(
        name,
        standings(scores),
        parameters=int(speed.get("parameters", {}).get(name, {}).get("with_head", 0)),
        size=int(speed.get("bytes", {}).get(name, 0)),
        milliseconds={int(rows): float(ms) for rows, ms in times.items()},
        ratios={part: ratio for part, ratio in ratios.items() if ratio},
    )


def teacher_among(models: Sequence[Measured]) -> Measured | None:
    """The teacher of the first model, where it is one of them."""
    return next((model for model in models[1:] if model.name == TEACHER), None)


def half_width(standing: Standing) -> float | None:
    """Half the 95 % interval: of a mean over seeds by Student's t, of a single value by its standard error; None where
    neither is known."""
    spread = over_seeds(standing.values)
    if "high" in spread:
        return spread["high"] - spread["mean"]
    return NORMAL * standing.error if standing.error else None


def set_names(models: Sequence[Measured]) -> list[str]:
    """All sets that any of the models has a standing on, run or not, in the order of the first model's."""
    return list(dict.fromkeys(standing.set_name for model in models for standing in model.standings))


def kept(student: Measured, teacher: Measured) -> float | None:
    """Mean over the sets that both were run on of student / teacher; None where there is no such set."""
    pairs = [(student.standing(name), teacher.standing(name)) for name in set_names((student,))]
    ratios = [one.mean / other.mean for one, other in pairs if one and other and other.mean > 0]
    return sum(ratios) / len(ratios) if ratios else None
