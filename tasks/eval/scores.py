"""Stores scores as artifacts: one JSON file per model, protocol, evaluation set and seed.

    key = ScoreKey(model_key, protocol, "heldout")
    scores = make_scores(store, key, compute)       # reads the store, or computes and stores

A repeated evaluation therefore computes only the scores that are missing.
"""

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
"""Plain JSON values by name: figures, or the status and reason from `not_run`."""


@dataclass(frozen=True)
class ScoreKey:
    """Identifies scores: the key of the model, the protocol, the name of the set and the seed.

    `protocol` contains, as plain JSON, everything that changes the figures except the model, the set and the seed.
    """

    model: str
    protocol: Mapping[str, Any]
    set_name: str
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The inputs of the key except the model."""
        return {"protocol": dict(self.protocol), "set": self.set_name, "seed": self.seed}

    @property
    def ref(self) -> Ref:
        """Reference to the scores in the store."""
        return Ref("scores", key_of("scores", SCHEMA, self.settings, [self.model]), f"{self.set_name}-{self.seed}")


def not_run(reason: str) -> Scores:
    """Returns a placeholder for figures that could not be computed; reports show the reason, and it is never stored."""
    return {"status": "not run", "reason": reason}


def was_run(scores: Mapping[str, Any]) -> bool:
    """Returns False if `scores` is a value from `not_run`, else True."""
    return scores.get("status") != "not run"


def make_scores(store: Store, key: ScoreKey, compute: Callable[[], Scores], *, force: bool = False) -> Scores:
    """Reads scores from the store, or computes and stores them; with `force`, always computes them.

    A `not_run` value is returned but not stored.
    """
    if not force and store.has(key.ref):
        return read_scores(store, key.ref)
    start = time.perf_counter()
    scores = compute()
    if was_run(scores):
        store_scores(store, key, scores, time.perf_counter() - start)
    return scores


def store_scores(store: Store, key: ScoreKey, scores: Scores, seconds: float = 0.0) -> Receipt:
    """Commits figures as `scores.json`; `seconds` is the computation time. ValueError if a figure is not finite."""
    with store.scratch() as folder:
        (folder / FILE).write_bytes(canonical_json(scores))
        return store.commit(
            key.ref,
            folder,
            schema=SCHEMA,
            rows=1,
            tokens=0,
            settings=key.settings,
            parents=[key.model],
            timings={"seconds": seconds},
        )


def read_scores(store: Store, ref: Ref) -> Scores:
    """Reads stored figures. FatalError if they are missing or their bytes have changed."""
    scores: Scores = json.loads((store.verified_folder(store.receipt(ref)) / FILE).read_bytes())
    return scores


TEACHER_PREFIX = "teacher_"
"""Prefix of the teacher's figures among the held-out figures of a student."""


def teacher_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Extracts the teacher's figures from the held-out figures of a student and removes their prefix."""
    return {
        name.removeprefix(TEACHER_PREFIX): value for name, value in figures.items() if name.startswith(TEACHER_PREFIX)
    }
