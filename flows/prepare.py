"""Prepares the training data of a corpus: sources, shards, blocks, token counts, calibration and targets.

    distil prepare RECIPE.toml                      from the command line
    flows/prepare.py:prepare                        entry point of the deployments `prepare/NAME`

The flow `distill` begins with the same stages. Each stage makes only missing artifacts. If a shard fails, only the
artifacts made from it are skipped.
"""

from typing import Any, Literal

from prefect import State

from flows.home import open_workspace
from flows.pipeline.preparation import finish_state, prepare_corpus, prepare_text
from flows.pipeline.task_policy import bound_flow
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths


def run_prepare(recipe: Recipe, until: Literal["blocks", "targets"] = "targets", command: str = "") -> State[Any]:
    """Makes the missing text shards, token blocks and teacher targets of a corpus, without training.

    Args:
        recipe: All settings of the run, by section, as in a recipe file.
        until: The last stage to run. "blocks" stops before the stages that need the teacher and a GPU.
        command: Recipe file and settings as typed at the command line. Leave it empty for a run of a deployment.
    """
    workspace = open_workspace(with_absolute_paths(recipe))
    prepared = prepare_corpus(workspace) if until == "targets" else prepare_text(workspace)
    return finish_state(prepared, command)


prepare = bound_flow(run_prepare, "prepare", run_name="{name}")
