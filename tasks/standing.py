"""How a model stands: its deciding figure on every set, over seeds. What gate, card and picture are made from.

standing = Standing("ner", "entity_f1", (0.871, 0.874, 0.869))
standing.mean, standing.sd
standings(scores)           # of every set that decides, from the scores of one model
protocols(scores)           # by which protocol each of them was scored
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Self

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


TEACHERS = "teacher_"
"""Begins the names of the teacher's figures among a student's on held-out text."""


@dataclass(frozen=True)
class Standing:
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


def standings(scores: Mapping[str, Mapping[str, Any]]) -> tuple[Standing, ...]:
    """Where one model stands on every set of its scores (set -> figures, or what `not_run` gives) that decides.

    Held-out text has a single value; a fine-tuned set (tasks.tuned.set_scores) one a seed, in the order of the seeds.
    """
    return tuple(_standing(name, METRICS[name], figures) for name, figures in scores.items() if name in METRICS)


def _standing(name: str, metric: str, figures: Mapping[str, Any]) -> Standing:
    if figures.get("status") == "not run":
        return Standing(name, metric, reason=str(figures["reason"]))
    if "runs" in figures:
        return Standing(name, metric, tuple(float(run[metric]) for run in figures["runs"].values()))
    return Standing(name, metric, (float(figures[metric]),), error=float(figures.get(f"{metric}_se", 0.0)))


def protocols(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each set that decides a name of all that its figure depends on but the model: only equals are compared."""
    return {name: str(figures.get("protocol", NOT_RUN)) for name, figures in scores.items() if name in METRICS}


def teachers_own(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's figures among those of a student on the same blocks, under their plain names; none without one."""
    return {name.removeprefix(TEACHERS): value for name, value in figures.items() if name.startswith(TEACHERS)}
