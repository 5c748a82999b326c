"""Implements `distil gc`: decides which artifacts of a store are kept, and lists or deletes all other files.

collect_garbage([recipe], delete=False)         # lists the files that would be deleted
"""

import sys
from collections.abc import Iterable, Sequence

from flows.home import open_store
from storage.errors import DistilError, FatalError
from storage.garbage_collection import gc
from storage.lease import leased_artifacts
from storage.store import Store
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe


def collect_garbage(recipes: Sequence[Recipe], *, delete: bool) -> None:
    """Lists, or with `delete` deletes, old files that no recipe, model or running training run refers to.

    DistilError if the recipes have different stores.
    """
    if len({recipe.store for recipe in recipes}) > 1:
        raise DistilError("these recipes have different stores; run `distil gc` once per store")
    store = open_store(recipes[0])
    unused = gc(store, artifacts_to_keep(store, recipes), delete=delete)
    for path in unused:
        print(path)
    print(f"{len(unused)} files {'deleted' if delete else 'would be deleted; add --delete to do it'}", file=sys.stderr)


def artifacts_to_keep(store: Store, recipes: Iterable[Recipe]) -> set[tuple[str, str]]:
    """Returns (kind, key) of every artifact that `gc` must keep.

    These are the recipes' artifacts and samples, all models and scores, the checkpoints of unfinished training runs,
    and the inputs of running ones, from any snapshot. FatalError: a source of a recipe has not been read.
    """
    from tasks.train.checkpoint import unfinished_checkpoints  # deferred: torch takes seconds to import

    keep = {(kind, key) for kind in ("model", "scores") for key in store.keys(kind)}
    keep |= {("checkpoint", key) for key in unfinished_checkpoints(store)}
    keep |= leased_artifacts(store)
    for recipe in recipes:
        lineage = Workspace(store, recipe).lineage
        unread = [source.label for source, ref in lineage.sources if ref is None or not store.has(ref)]
        if unread:
            raise FatalError(
                f"recipe {recipe.name}: source {unread[0]} has not been read, so its shards are unknown and gc could "
                "delete them; run `distil retry` first"
            )
        keep |= {(ref.kind, ref.key) for refs in lineage.stages().values() for ref in refs}
        keep |= {(ref.kind, ref.key) for ref in lineage.sample}
    return keep
