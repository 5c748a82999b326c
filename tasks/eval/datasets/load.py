"""Loads and checks an evaluation set of a protocol by its name.

    data = load_set("xnli", protocol.sets["xnli"], root="/data/eval")
    data.train, data.validation, data.test, data.fingerprint

"ner" is loaded as a `NerSet` (words with tags), all other sets as a `LabelledSet` (texts or text pairs with one label).
"""

from functools import lru_cache

from storage.errors import FatalError
from tasks.eval.datasets.cls import load_reviews
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.labelled import LabelledSet
from tasks.eval.datasets.ner import NerSet, load_ner
from tasks.eval.datasets.pairs import SCHEMAS, load_pairs
from tasks.eval.protocol import SetName, SetPlan

AnySet = LabelledSet | NerSet


def load_set(name: SetName, plan: SetPlan, root: str = "") -> AnySet:
    """Loads a set from a folder below `root` (score.sets), or from the hub if `root` is empty.

    FatalError if the set is missing, violates its schema, or does not have the numbers of rows in `plan.rows`.
    RetryableError if the network does not respond.
    """
    data = _load(name, plan.location(name, root))
    for split, rows in plan.rows.items():
        if data.counts[split]["rows"] != rows:
            raise FatalError(
                f"{data.source}: the {split} split of {name} has {data.counts[split]['rows']} rows, but the protocol "
                f"expects {rows}; download the complete set, or correct sets.{name}.rows in the protocol",
                data.source,
            )
    return data


@lru_cache(maxsize=1)
def _load(name: SetName, location: SetLocation) -> AnySet:
    """Loads a set and caches it until another one is loaded: all models and seeds use one set before the next."""
    if name == "ner":
        return load_ner(name, location)
    return load_pairs(name, location) if name in SCHEMAS else load_reviews(name, location)
