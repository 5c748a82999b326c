"""How a model stands: its deciding figure on every set, over seeds. What gate, card and picture are made from.

standing = Standing("ner", "entity_f1", (0.871, 0.874, 0.869))
standing.mean, standing.sd
standings(scores)           # of every set that decides, from the scores of one model
protocols(scores)           # by which protocol each of them was scored
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Self

from tasks.eval.intervals import NORMAL, over_seeds
from tasks.eval.scores import teachers_own

TEACHER = "teacher"

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class SetResult:
    """One model on one set: values of `metric` between 0 and 1, one a seed. No values: not run, for `reason`.

    `error` is the standard error of a single value over the rows that it was measured on; 0 where it is unknown.
    """

    set_name: str
    metric: str
    values: tuple[float, ...] = ()
    reason: str = ""
    error: float = 0.0

    @property
    def was_run(self) -> bool:
        """False where there is no figure."""
        return bool(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds. ValueError if it was not run."""
        if not self.values:
            raise ValueError(f"{self.set_name} was not run: {self.reason}")
        return fmean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds; 0 with a single one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"values": list(self.values)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The other way round."""
        return cls(**(values | {"values": tuple(values["values"])}))


@dataclass(frozen=True)
class ModelSummary:
    """`parameters` with the LM head, `size` in bytes of weight files, `milliseconds` of one forward on the CPU by batch
    size; 0 and empty where nobody measured. `ratios`: by set `value`, `low`, `high` of its score to its teacher's."""

    name: str
    set_results: tuple[SetResult, ...] = ()
    parameters: int = 0
    size: int = 0
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def standing(self, set_name: str) -> SetResult | None:
        """Its standing on a set if it was run there, else None."""
        return next((one for one in self.set_results if one.set_name == set_name and one.was_run), None)


def summarize_models(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[ModelSummary, ...]:
    """All models of a comparison (model -> set -> figures): the first, its teacher where one was measured, the others.

    Size and speed of all stand among the scores of the first.
    """
    first = next(iter(scores))
    speed = scores[first].get("size-and-speed", {})
    found = {name: _summarize(name, own, speed) for name, own in scores.items()}
    if TEACHER not in found:
        own = teachers_own(scores[first].get("heldout", {}))
        if own or TEACHER in speed.get("parameters", {}):
            found[TEACHER] = _summarize(TEACHER, {"heldout": own} if own else {}, speed)
    order = dict.fromkeys([first, *([TEACHER] if TEACHER in found else []), *found])
    return tuple(found[name] for name in order)


def _summarize(name: str, scores: Mapping[str, Scores], speed: Scores) -> ModelSummary:
    times = speed.get("latency", {}).get("ms", {}).get(name, {})
    ratios = {part: figures.get("against_teacher", {}).get("ratio") for part, figures in scores.items()}
    return ModelSummary(
        name,
        set_results(scores),
        parameters=int(speed.get("parameters", {}).get(name, {}).get("with_head", 0)),
        size=int(speed.get("bytes", {}).get(name, 0)),
        milliseconds={int(rows): float(ms) for rows, ms in times.items()},
        ratios={part: ratio for part, ratio in ratios.items() if ratio},
    )


def teacher_among(models: Sequence[ModelSummary]) -> ModelSummary | None:
    """The teacher of the first model, where it is one of them."""
    return next((model for model in models[1:] if model.name == TEACHER), None)


def half_width(standing: SetResult) -> float | None:
    """Half the 95 % interval: of a mean over seeds by Student's t, of a single value by its standard error; None where
    neither is known."""
    spread = over_seeds(standing.values)
    if "high" in spread:
        return spread["high"] - spread["mean"]
    return NORMAL * standing.error if standing.error else None


def set_names(models: Sequence[ModelSummary]) -> list[str]:
    """All sets that any of the models has a standing on, run or not, in the order of the first model's."""
    return list(dict.fromkeys(standing.set_name for model in models for standing in model.set_results))


def kept(student: ModelSummary, teacher: ModelSummary) -> float | None:
    """Mean over the sets that both were run on of student / teacher; None where there is no such set."""
    pairs = [(student.standing(name), teacher.standing(name)) for name in set_names((student,))]
    ratios = [one.mean / other.mean for one, other in pairs if one and other and other.mean > 0]
    return sum(ratios) / len(ratios) if ratios else None


METRICS = {
    "heldout": "top1",
    "cls": "accuracy",
    "cls-books": "accuracy",
    "cls-dvd": "accuracy",
    "cls-music": "accuracy",
    "paws-x": "accuracy",
    "xnli": "accuracy",
    "ner": "entity_f1",
    "fine-tuning": "",
}
"""The figure by which a set is judged. `fine-tuning` stands for all fine-tuned sets where no protocol names any."""

NOT_RUN = "none"
"""Stands in the place of the protocol where there is no figure."""


def set_results(scores: Mapping[str, Mapping[str, Any]]) -> tuple[SetResult, ...]:
    """Where one model stands on every set of its scores (set -> figures, or what `not_run` gives) that decides.

    Held-out text has a single value; a fine-tuned set (tasks.tuned.set_scores) one a seed, in the order of the seeds.
    """
    return tuple(_set_result(name, METRICS[name], figures) for name, figures in scores.items() if name in METRICS)


def _set_result(name: str, metric: str, figures: Mapping[str, Any]) -> SetResult:
    if figures.get("status") == "not run":
        return SetResult(name, metric, reason=str(figures["reason"]))
    if "runs" in figures:
        return SetResult(name, metric, tuple(float(run[metric]) for run in figures["runs"].values()))
    return SetResult(name, metric, (float(figures[metric]),), error=float(figures.get(f"{metric}_se", 0.0)))


def protocol_keys(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each set that decides a name of all that its figure depends on but the model: only equals are compared."""
    return {name: str(figures.get("protocol", NOT_RUN)) for name, figures in scores.items() if name in METRICS}
