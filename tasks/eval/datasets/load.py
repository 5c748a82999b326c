"""Every set of a protocol by its name, loaded and checked.

data = load_set("xnli", protocol.sets["xnli"], root="/data/eval")
"""

from functools import lru_cache

from storage.errors import FatalError
from tasks.eval.datasets.cls import load_reviews
from tasks.eval.datasets.files import Place
from tasks.eval.datasets.labelled import LabelledSet
from tasks.eval.datasets.ner import NerSet, load_ner
from tasks.eval.datasets.pairs import SCHEMAS, load_pairs
from tasks.eval.protocol import SetName, SetPlan

AnySet = LabelledSet | NerSet


def load_set(name: SetName, plan: SetPlan, root: str = "") -> AnySet:
    """Loads a set from below `root` (score.sets), or from the hub where that is empty.

    FatalError: it is not there, does not fit its schema, or has not as many rows as the plan says. RetryableError where
    the network does not answer.
    """
    data = _load(name, plan.place(name, root))
    for split, rows in plan.rows.items():
        if data.counts[split]["rows"] != rows:
            raise FatalError(
                f"{data.source}: the {split} split of {name} has {data.counts[split]['rows']} rows where the protocol "
                f"expects {rows}; get the whole set, or correct sets.{name}.rows",
                data.source,
            )
    return data


@lru_cache(maxsize=1)
def _load(name: SetName, place: Place) -> AnySet:
    """One set stays loaded, since every model and seed asks for it in turn."""
    if name == "ner":
        return load_ner(name, place)
    return load_pairs(name, place) if name in SCHEMAS else load_reviews(name, place)
