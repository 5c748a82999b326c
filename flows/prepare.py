"""From a corpus folder to the teacher's targets: sources, shards, blocks, token counts, calibration, targets.

    prepare(recipe)        a flow of its own (deployment `prepare`), and the first half of `distill`

Each stage asks the store what is missing and submits only that; a shard that fails holds back only what is made of it.
"""

from typing import Any, Literal

from prefect import State

from flows.home import open_store
from flows.pipeline.preparation import finish_state, prepare_corpus, prepare_text
from flows.pipeline.task_policy import bound_flow
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

# ---- flow and failures -------------------------------------------------------------------------------------


def run_prepare(recipe: Recipe, until: Literal["blocks", "targets"] = "targets") -> State[Any]:
    """Makes shards, blocks and targets of a corpus, as far as they are missing; trains nothing.

    Args:
        recipe: Everything that the run needs to know, section by section as in a recipe file.
        until: blocks stops before the teacher is needed, for a machine without a GPU.
    """
    recipe = with_absolute_paths(recipe)
    store = open_store(recipe)
    prepared = prepare_corpus(store, recipe) if until == "targets" else prepare_text(store, recipe)
    return finish_state(recipe, prepared)


prepare = bound_flow(run_prepare, "prepare", run_name="{name}")
