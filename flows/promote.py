"""Promotion: the gate's word on a version, kept as tags and as a Prefect artifact, and the alias `champion`.

    distil promote RECIPE.toml [--version V] [--force --reason "..."]
    flows/promote.py:promote                    entry point of the deployments `promote/NAME` (queue `promote`)
    judgement = gate(recipe, registry, version) the same inside `distill`, after its scores

All that a judgement needs is in MLflow: `record_standings` keeps the deciding figures as tags of the version. MLflow's
aliases have no compare-and-set: below one home promotions take turns by a file lock; among machines the champion is
looked at again right before the alias is moved, and if it is another one the candidate is judged anew.
"""

from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.pipeline.task_policy import bound_flow
from flows.release.gate import PromotionRequest, _who, decide_in_flow, gate_rows, set_rows
from flows.tracking.registry import open_registry
from flows.views.tables import show_sheet
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

# ---- the flow ----------------------------------------------------------------------------------------------


def run_promote(
    recipe: Recipe, model: str = "", version: str = "", force: bool = False, reason: str = "", by: str = ""
) -> State[Any]:
    """Makes a registered version the champion if the gate lets it through; the decision is kept with the version.

    Args:
        recipe: Whose gate rules and whose MLflow are taken.
        model: Name of the registered model, to make sure; empty means the recipe's own, and no other will do.
        version: Number of the version; empty means the challenger.
        force: Make it the champion whatever the gate says; needs a reason.
        reason: Why it is forced; kept with the version.
        by: Who asks; empty means this flow run.
    """
    if force and not reason.strip():
        raise FatalError("force needs a reason, which is kept with the version; give --reason")
    recipe = with_absolute_paths(recipe)
    own = recipe.register_as.name
    if model and model != own:
        raise FatalError(
            f"recipe {recipe.name} registers {own}, so its gate says nothing about {model}; name the recipe of {model}"
        )
    registry = open_registry(recipe)
    candidate = registry.version(own, version)
    judgement = decide_in_flow(recipe, registry, candidate, PromotionRequest(by or _who(), force, reason.strip()))
    show_sheet(str(candidate), {"Gate": gate_rows(judgement), "Sets": set_rows(judgement.rows)})
    if judgement.is_champion:
        return Completed(message=judgement.sentence)
    return Failed(name="Refused", message=judgement.sentence)


promote = bound_flow(run_promote, "promote", run_name="{name} {model} {version}")
