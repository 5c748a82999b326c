"""A run that the store cannot hold does not start. Called by the flows `prepare` and `distill` on the way in."""

from flows.status import model_ref
from storage.store import Store
from storage.upkeep import free_bytes
from tasks.config import Recipe
from tasks.lineage import Lineage
from tasks.room import refuse_small_store


def check_room(store: Store, recipe: Recipe, lineage: Lineage, *, training: bool) -> None:
    """FatalError if what is missing does not fit. Where nothing is, nothing is asked; an object store does not tell."""
    free = free_bytes(store)
    if free is not None and _lacks(store, recipe, lineage, training=training):
        refuse_small_store(store, recipe, lineage, free, training=training)


def _lacks(store: Store, recipe: Recipe, lineage: Lineage, *, training: bool) -> bool:
    """True if anything is still to be made."""
    if not training:
        return lineage.lacks(store)
    model = model_ref(store, recipe, lineage)
    return model is None or not store.has(model)
