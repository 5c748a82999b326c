"""Scores as artifacts: one JSON file per model, protocol, set and seed."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.artifact import Receipt, Ref
from storage.fingerprint import canonical_json, key_of
from storage.store import Store

SCHEMA = 1

FILE = "scores.json"

Scores = dict[str, Any]
"""Plain JSON values by name: figures, or what `not_run` gives."""


# ---- what is kept ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreKey:
    """One model, one protocol (plain JSON: everything that changes the figures), one set, one seed."""

    model: str
    protocol: Mapping[str, Any]
    set_name: str
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the key is made of, besides the model."""
        return {"protocol": dict(self.protocol), "set": self.set_name, "seed": self.seed}

    @property
    def ref(self) -> Ref:
        """Names the scores in the store."""
        return Ref("scores", key_of("scores", SCHEMA, self.settings, [self.model]), f"{self.set_name}-{self.seed}")


def not_run(reason: str) -> Scores:
    """Stands in the place of figures that could not be had; it is shown, never left out and never stored."""
    return {"status": "not run", "reason": reason}


def was_run(scores: Mapping[str, Any]) -> bool:
    """False for what `not_run` gave."""
    return scores.get("status") != "not run"


def make_scores(store: Store, trial: ScoreKey, compute: Callable[[], Scores], *, force: bool = False) -> Scores:
    """The scores of a trial: read from the store, or computed and kept. What is not run is not kept."""
    if not force and store.has(trial.ref):
        return read_scores(store, trial.ref)
    start = time.perf_counter()
    scores = compute()
    if was_run(scores):
        keep_scores(store, trial, scores, time.perf_counter() - start)
    return scores


def keep_scores(store: Store, trial: ScoreKey, scores: Scores, seconds: float = 0.0) -> Receipt:
    """Commits figures as `scores.json`. ValueError for a figure that is not finite."""
    with store.scratch() as folder:
        (folder / FILE).write_bytes(canonical_json(scores))
        return store.commit(
            trial.ref,
            folder,
            schema=SCHEMA,
            rows=1,
            tokens=0,
            settings=trial.settings,
            parents=[trial.model],
            timings={"seconds": seconds},
        )


def read_scores(store: Store, ref: Ref) -> Scores:
    """The figures as they were kept. FatalError where there are none or their bytes changed."""
    scores: Scores = json.loads((store.check(store.receipt(ref)) / FILE).read_bytes())
    return scores


TEACHERS = "teacher_"
"""Begins the names of the teacher's figures among a student's on held-out text."""


def teachers_own(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's figures among those of a student on the same blocks, under their plain names; none without one."""
    return {name.removeprefix(TEACHERS): value for name, value in figures.items() if name.startswith(TEACHERS)}
