"""Scores of one model on the sets of a protocol, seed by seed, kept in the store.

    score_seed(store, model_key, folder, data, protocol, seed)       # one set, one seed: computed unless it is there
    scores = set_scores(store, model_key, data, protocol)            # all seeds of a set: figures with intervals
    compare(store, model_key, other_key, data, protocol)             # ratio and difference, paired by test rows

A score's key is made of the model, the protocol of that set, the set's content and the seed; so a set that changes,
or a seed that is added, computes what is new and nothing else. Called by the flows.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.eval.datasets.labelled import LabelledSet
from tasks.eval.datasets.load import AnySet
from tasks.eval.finetune import FineTuneTask, finetune
from tasks.eval.intervals import paired_difference, summarize_seeds
from tasks.eval.metrics import row_counts
from tasks.eval.protocol import SCHEMA, Protocol, Tuning
from tasks.eval.scores import ScoreKey, Scores, make_scores, read_scores
from tasks.eval.sentence_head import SentenceTask
from tasks.eval.token_head import TokenTask

APART = ("predictions", "choice")
"""Parts of a seed's scores that are no figures to average."""


def task_of(data: AnySet, tuning: Tuning) -> FineTuneTask:
    """What this sort of set needs."""
    if isinstance(data, LabelledSet):
        return SentenceTask(data.labels)
    return TokenTask(tuning.labelled)


def score_key_of(model_key: str, data: AnySet, protocol: Protocol, seed: int) -> ScoreKey:
    """Names the scores of one model, set and seed. The first seed is in it, since it chose the learning rate."""
    tuning = protocol.tuning_of(data.name).model_dump(mode="json")
    settings = {"schema": SCHEMA, "tuning": tuning, "content": data.fingerprint, "first_seed": protocol.seeds[0]}
    return ScoreKey(model_key, settings, data.name, seed)


def protocol_key(data: AnySet, protocol: Protocol) -> str:
    """Names the protocol of one set, its content and its seeds."""
    return sha256_bytes(canonical_json([score_key_of("", data, protocol, 0).settings, protocol.seeds]))


def missing_seeds(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> list[int]:
    """Seeds whose scores are not in the store."""
    return [seed for seed in protocol.seeds if not store.has(score_key_of(model_key, data, protocol, seed).ref)]


def score_seed(
    store: Store,
    model_key: str,
    folder: Path,
    data: AnySet,
    protocol: Protocol,
    seed: int,
    *,
    device: str = "auto",
    force: bool = False,
) -> Scores:
    """The scores of one seed: from the store, or by fine-tuning. See tasks.finetune for the figures.

    The first seed tries every learning rate; another takes the one that the first chose. FatalError if the first is
    not there yet.
    """
    tuning = protocol.tuning_of(data.name)
    rates = tuning.lr
    first = score_key_of(model_key, data, protocol, protocol.seeds[0])
    if seed != protocol.seeds[0] and len(rates) > 1:
        if not store.has(first.ref):
            raise FatalError(
                f"{data.name} seed {seed}: seed {protocol.seeds[0]} comes first, since it chooses the learning rate"
            )
        rates = (read_scores(store, first.ref)["choice"]["lr"],)
    compute = partial(finetune, folder, data, task_of(data, tuning), tuning, seed, rates, device)
    return make_scores(store, score_key_of(model_key, data, protocol, seed), compute, force=force)


def set_scores(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> Scores:
    """All seeds of one set as they are kept.

    {"set", "source", "rule", "counts", "protocol", "metric", "lr", "grid", "runs": figures by seed, "summary"}.
    `protocol` names everything that the figures depend on besides the model: only equals are comparable. `grid` is the
    best validation figure of every learning rate. `summary` has for every figure mean, sd and a 95 % interval over the
    seeds. FatalError where a seed is not there.
    """
    kept = _runs(store, model_key, data, protocol)
    runs = {seed: {name: value for name, value in run.items() if name not in APART} for seed, run in kept.items()}
    first = kept[protocol.seeds[0]]["choice"]
    return {
        "set": data.name,
        "source": data.source,
        "rule": data.rule,
        "counts": {split: dict(counts) for split, counts in data.counts.items()},
        "protocol": protocol_key(data, protocol),
        "metric": task_of(data, protocol.tuning_of(data.name)).metric,
        "lr": first["lr"],
        "grid": first["grid"],
        "runs": {str(seed): run for seed, run in runs.items()},
        "summary": summarize_seeds(list(runs.values())),
    }


def compare(store: Store, ours: str, theirs: str, data: AnySet, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Ratio and difference of two models on a set, by the figure that it is judged by; see tasks.interval.against."""
    metric = task_of(data, protocol.tuning_of(data.name)).metric
    counted = [
        np.stack([row_counts(metric, run["predictions"]) for run in _runs(store, key, data, protocol).values()])
        for key in (ours, theirs)
    ]
    return paired_difference(counted[0], counted[1])


def _runs(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> dict[int, dict[str, Any]]:
    return {seed: read_scores(store, score_key_of(model_key, data, protocol, seed).ref) for seed in protocol.seeds}
