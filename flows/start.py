"""Where training starts: train.warm_start as a folder on this machine, and the training run planned with it.

    run = plan(store, recipe, lineage)

A registered model (`models:/NAME@ALIAS`, `models:/NAME/VERSION`) is fetched from MLflow, of which the tasks know
nothing. Used by the flow `distill`, by `distil run` and by `distil status`, so that all three mean the same run.
"""

from flows.home import REGISTERED
from storage.artifact import Ref
from storage.store import Store
from tasks.config import Recipe
from tasks.lineage import Lineage, plan_key, plan_run
from tasks.run import RunSpec, model_ref


def plan(store: Store, recipe: Recipe, lineage: Lineage) -> RunSpec:
    """The training run of a recipe. FatalError: train.warm_start names no model."""
    return plan_run(store, with_local_start(recipe), lineage)


def key(recipe: Recipe, lineage: Lineage) -> str:
    """The key of that run where nothing of the lineage is missing. The same error."""
    return plan_key(with_local_start(recipe), lineage)


def model(recipe: Recipe, lineage: Lineage) -> Ref:
    """Names the model that it ends with. The same error."""
    return model_ref(key(recipe, lineage), recipe.name)


def with_local_start(recipe: Recipe) -> Recipe:
    """The recipe, with a registered model in train.warm_start replaced by its folder."""
    if not recipe.train.warm_start.startswith(REGISTERED):
        return recipe
    # Deferred: it imports MLflow, which takes seconds and which most recipes do not need here.
    from flows.registry import fetch_model

    folder = fetch_model(recipe, recipe.train.warm_start)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"warm_start": str(folder)})})
