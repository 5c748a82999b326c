"""Tries again what is missing: all of it, one stage, or one shard. `distil retry` and the deployment `retry-shard`.

    retry_shard(recipe, stage="targets", shard="fr_meta_part_3-0002")

The same stages as in `prepare`: a retry of what is done already does nothing, unless it is forced.
"""

from typing import Any, Literal, get_args

from prefect import State

from flows.home import open_store
from flows.pipeline.preparation import Selection, finish_state, plain_label, prepare_corpus, silently_missing
from flows.pipeline.task_policy import bound_flow
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

Stage = Literal["all", "source", "shard", "blocks", "counts", "calibration", "targets"]


def run_retry(recipe: Recipe, stage: Stage = "all", shard: str = "", force: bool = False) -> State[Any]:
    """Makes missing sources, blocks and targets again: all of them, those of one stage, or one shard.

    Args:
        recipe: The recipe that the shard belongs to.
        stage: Which stage, as `distil status` names them.
        shard: Label of a shard or source as `distil status` shows it; empty means all that are missing.
        force: Make it again even if it is there.
    """
    if stage not in get_args(Stage):
        raise FatalError(f"there is no stage {stage!r}; take one of {', '.join(get_args(Stage))}")
    if force and stage == "all" and not shard:
        raise FatalError("force needs a stage or a shard, so that not everything is made again")
    recipe = with_absolute_paths(recipe)
    # Who asks for a retry wants the targets made, whatever a run does about missing ones.
    recipe = recipe.model_copy(update={"targets": recipe.targets.model_copy(update={"on_missing": "compute"})})
    store = open_store(recipe)
    only = Selection("" if stage == "all" else stage, shard, force)
    prepared = prepare_corpus(store, recipe, only)
    if shard and not prepared.stages and not only.named(prepared.lineage):
        raise FatalError(
            f"no shard {shard!r} in {only.stage or 'any stage'} of {recipe.name}; `distil status` lists them"
        )
    lacking = [
        ref
        for ref in silently_missing(store, prepared)
        if only.stage in ("", ref.kind) and shard in ("", ref.label, plain_label(ref.label))
    ]
    if lacking and not prepared.failures:
        first = lacking[0]
        raise FatalError(
            f"{first.kind} {first.label} is still missing, because something that it is made from is; "
            "run `distil retry` without --stage and --shard"
        )
    return finish_state(recipe, prepared)


retry_shard = bound_flow(run_retry, "retry-shard", run_name="{name} {stage} {shard}")
