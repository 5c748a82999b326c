"""Reduces a model's scores to one result per evaluation set, for the promotion rule, the model card and the figure.

    results = results_of_sets(scores)                   # SetResult per set, from the scores of one model
    results[0].mean, results[0].sd
    protocols = protocol_keys(scores)               # set name -> key of the protocol that it was scored by
    models = summarize_models(scores_by_model)      # ModelSummary per model: results, size and speed

Each set is represented by one metric: see `METRICS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Self

from tasks.eval.intervals import Z_95, over_seeds
from tasks.eval.scores import teacher_figures, was_run

TEACHER = "teacher"

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
"""The metric of each set. `fine-tuning` represents all fine-tuned sets of a run without a protocol."""

NOT_RUN = "none"
"""Used instead of a protocol key for a set that was not run."""

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class SetResult:
    """Result of one model on one set: one value of `metric`, between 0 and 1, per seed.

    A set without values was not run, for the given `reason`. `error` is the standard error of a single value over the
    blocks that it was measured on; 0 if unknown.
    """

    set_name: str
    metric: str
    values: tuple[float, ...] = ()
    reason: str = ""
    error: float = 0.0

    @property
    def was_run(self) -> bool:
        """True if the result has values."""
        return bool(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds. ValueError if the set was not run."""
        if not self.values:
            raise ValueError(f"{self.set_name} was not run: {self.reason}")
        return fmean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds; 0 with a single seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self) | {"values": list(self.values)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restores a result from the value of `to_json`."""
        return cls(**(values | {"values": tuple(values["values"])}))


@dataclass(frozen=True)
class ModelSummary:
    """Results, size and speed of one model.

    `parameters` includes the LM head; `size` is the bytes of the weight files; `milliseconds` is the time of one
    forward pass on the CPU by batch size. These are 0 or empty if not measured. `ratios` contains, by set, the `value`,
    `low` and `high` of the ratio of the model's score to the teacher's.
    """

    name: str
    set_results: tuple[SetResult, ...] = ()
    parameters: int = 0
    size: int = 0
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def result_on(self, set_name: str) -> SetResult | None:
        """Returns the result on a set, or None if the set was not run."""
        return next((one for one in self.set_results if one.set_name == set_name and one.was_run), None)


# ---- from scores -------------------------------------------------------------------------------------------


def results_of_sets(scores: Mapping[str, Scores]) -> tuple[SetResult, ...]:
    """Returns the results of one model from its scores (set name -> figures, or a `not_run` value).

    Scores of sets without a metric are ignored. Held-out text has a single value, a fine-tuned set one value per seed
    in the order of the seeds.
    """
    return tuple(_result_of_set(name, METRICS[name], figures) for name, figures in scores.items() if name in METRICS)


def _result_of_set(name: str, metric: str, figures: Scores) -> SetResult:
    if not was_run(figures):
        return SetResult(name, metric, reason=str(figures["reason"]))
    if "runs" in figures:
        return SetResult(name, metric, tuple(float(run[metric]) for run in figures["runs"].values()))
    return SetResult(name, metric, (float(figures[metric]),), error=float(figures.get(f"{metric}_se", 0.0)))


def protocol_keys(scores: Mapping[str, Scores]) -> dict[str, str]:
    """Returns the protocol key of each set with a metric; results are comparable only if their keys are equal."""
    return {name: str(figures.get("protocol", NOT_RUN)) for name, figures in scores.items() if name in METRICS}


def summarize_models(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[ModelSummary, ...]:
    """Summarizes compared models (model name -> set name -> figures): the first, its teacher if scored, the others.

    Size and speed of all models are read from the scores of the first model. If the teacher has no scores of its own,
    its figures on held-out text are read from those of the first model.
    """
    first = next(iter(scores))
    speed = scores[first].get("size-and-speed", {})
    summaries = {name: _summarize(name, own, speed) for name, own in scores.items()}
    if TEACHER not in summaries:
        own = teacher_figures(scores[first].get("heldout", {}))
        if own or TEACHER in speed.get("parameters", {}):
            summaries[TEACHER] = _summarize(TEACHER, {"heldout": own} if own else {}, speed)
    order = dict.fromkeys([first, *([TEACHER] if TEACHER in summaries else []), *summaries])
    return tuple(summaries[name] for name in order)


def _summarize(name: str, scores: Mapping[str, Scores], speed: Scores) -> ModelSummary:
    times = speed.get("latency", {}).get("ms", {}).get(name, {})
    ratios = {set_name: figures.get("against_teacher", {}).get("ratio") for set_name, figures in scores.items()}
    return ModelSummary(
        name,
        results_of_sets(scores),
        parameters=int(speed.get("parameters", {}).get(name, {}).get("with_head", 0)),
        size=int(speed.get("bytes", {}).get(name, 0)),
        milliseconds={int(rows): float(ms) for rows, ms in times.items()},
        ratios={set_name: ratio for set_name, ratio in ratios.items() if ratio},
    )


# ---- over models -------------------------------------------------------------------------------------------


def teacher_among(models: Sequence[ModelSummary]) -> ModelSummary | None:
    """Returns the teacher of the first model if it is one of the other models, else None."""
    return next((model for model in models[1:] if model.name == TEACHER), None)


def names_of_sets(models: Sequence[ModelSummary]) -> list[str]:
    """Returns the names of all sets that any model has a result on, run or not; sets of the first model come first."""
    return list(dict.fromkeys(result.set_name for model in models for result in model.set_results))


def half_width(result: SetResult) -> float | None:
    """Returns half the width of the 95 % interval, or None if it is unknown.

    With several seeds, Student's t gives the interval of the mean; with a single value, its standard error does.
    """
    spread = over_seeds(result.values)
    if "high" in spread:
        return spread["high"] - spread["mean"]
    return Z_95 * result.error if result.error else None


def retained_share(student: ModelSummary, teacher: ModelSummary) -> float | None:
    """Returns the mean of student score / teacher score over the sets that both were run on, or None without any."""
    pairs = [(student.result_on(name), teacher.result_on(name)) for name in names_of_sets((student,))]
    ratios = [one.mean / other.mean for one, other in pairs if one and other and other.mean > 0]
    return sum(ratios) / len(ratios) if ratios else None
