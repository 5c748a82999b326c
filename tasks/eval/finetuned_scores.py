"""Stores the fine-tuned scores of a model by set and seed, and summarizes and compares them.

    score_seed(store, model_key, folder, data, protocol, seed)       # one set, one seed: fine-tunes unless stored
    scores = scores_of_set(store, model_key, data, protocol)            # all seeds of a set: figures with intervals
    compare_models(store, model_key, other_key, data, protocol)      # ratio and difference, paired by test row

The key of a score consists of the model, the tuning of the set, the content of the set and the seed. After a change of
a set or an added seed, only the missing scores are therefore computed.
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
from tasks.eval.sentence_classification import SentenceTask
from tasks.eval.token_classification import TokenTask

NOT_AVERAGED = ("predictions", "choice")
"""Fields of the scores of a seed that are not averaged over seeds."""


def task_of(data: AnySet, tuning: Tuning) -> FineTuneTask:
    """Returns the fine-tuning task of a set: sentence classification or token classification."""
    if isinstance(data, LabelledSet):
        return SentenceTask(data.labels)
    return TokenTask(tuning.labelled)


def score_key_of(model_key: str, data: AnySet, protocol: Protocol, seed: int) -> ScoreKey:
    """Returns the key of the scores of one model, set and seed; it includes the first seed, which selects the rate."""
    tuning = protocol.tuning_of(data.name).model_dump(mode="json")
    settings = {"schema": SCHEMA, "tuning": tuning, "content": data.fingerprint, "first_seed": protocol.seeds[0]}
    return ScoreKey(model_key, settings, data.name, seed)


def protocol_key(data: AnySet, protocol: Protocol) -> str:
    """Returns the hash of a set's tuning, content and seeds; scores are comparable only if these hashes are equal."""
    return sha256_bytes(canonical_json([score_key_of("", data, protocol, 0).settings, protocol.seeds]))


def missing_seeds(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> list[int]:
    """Returns the seeds whose scores are not in the store."""
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
    """Reads the scores of one seed from the store, or fine-tunes and stores them; `finetune` defines the figures.

    The first seed tries each learning rate; the other seeds use the rate that the first one selected. FatalError if
    the scores of the first seed are missing when another seed needs them.
    """
    tuning = protocol.tuning_of(data.name)
    rates = tuning.lr
    first = score_key_of(model_key, data, protocol, protocol.seeds[0])
    if seed != protocol.seeds[0] and len(rates) > 1:
        if not store.has(first.ref):
            raise FatalError(
                f"{data.name} seed {seed}: run seed {protocol.seeds[0]} first, since it selects the learning rate"
            )
        rates = (read_scores(store, first.ref)["choice"]["lr"],)
    compute = partial(finetune, folder, data, task_of(data, tuning), tuning, seed, rates, device)
    return make_scores(store, score_key_of(model_key, data, protocol, seed), compute, force=force)


def scores_of_set(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> Scores:
    """Returns the stored scores of all seeds of one set, with their summary.

    {"set", "source", "rule", "counts", "protocol", "metric", "lr", "grid", "runs": figures by seed, "summary"}

    `protocol` is the value of `protocol_key`, `lr` the selected learning rate, and `grid` the best validation score of
    each rate. `summary` contains the mean, standard deviation and 95 % interval of each figure (see `over_seeds`).
    FatalError if the scores of a seed are missing.
    """
    stored = _runs(store, model_key, data, protocol)
    runs = {
        seed: {name: value for name, value in run.items() if name not in NOT_AVERAGED} for seed, run in stored.items()
    }
    first = stored[protocol.seeds[0]]["choice"]
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


def compare_models(
    store: Store, ours: str, theirs: str, data: AnySet, protocol: Protocol
) -> dict[str, dict[str, float]]:
    """Returns the ratio and difference of two models' scores on a set, over all seeds.

    `ours` and `theirs` are the keys of the models. See `paired_difference` for the intervals. FatalError if the scores
    of a seed are missing.
    """
    metric = task_of(data, protocol.tuning_of(data.name)).metric
    counts = [
        np.stack([row_counts(metric, run["predictions"]) for run in _runs(store, key, data, protocol).values()])
        for key in (ours, theirs)
    ]
    return paired_difference(counts[0], counts[1])


def _runs(store: Store, model_key: str, data: AnySet, protocol: Protocol) -> dict[int, dict[str, Any]]:
    return {seed: read_scores(store, score_key_of(model_key, data, protocol, seed).ref) for seed in protocol.seeds}
