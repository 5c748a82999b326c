"""Retries missing artifacts: all of them, one stage, or one shard.

    distil retry RECIPE.toml --stage targets --shard fr_meta_part_3-0002
    flows/retry.py:retry_shard                      entry point of the deployments `retry-shard/NAME`

Runs the stages of `prepare`. An artifact that exists is not made again, unless the retry is forced.
"""

from typing import Any, Literal, get_args

from prefect import State

from flows.home import open_workspace
from flows.pipeline.preparation import Selection, finish_state, plain_label, prepare_corpus, silently_missing
from flows.pipeline.task_policy import bound_flow
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

Stage = Literal["all", "source", "shard", "blocks", "counts", "calibration", "targets"]


def run_retry(
    recipe: Recipe, stage: Stage = "all", shard: str = "", force: bool = False, command: str = ""
) -> State[Any]:
    """Makes missing shards, blocks and targets: all of them, those of one stage, or those of one shard.

    Args:
        recipe: The recipe that the shard belongs to.
        stage: The stage to retry, as `distil status` names it; all means every stage up to the targets.
        shard: Label of a shard or source as `distil status` shows it; empty means all that are missing.
        force: Make the artifacts again even if they exist. Needs a stage or a shard.
        command: Recipe file and settings as typed at the command line. Leave it empty for a run of a deployment.
    """
    if stage not in get_args(Stage):
        raise FatalError(f"stage {stage!r} does not exist; choose one of {', '.join(get_args(Stage))}")
    if force and stage == "all" and not shard:
        raise FatalError("force needs a stage or a shard, so that not everything is made again")
    # A retry computes missing targets, whatever policy the recipe has for runs.
    recipe = with_absolute_paths(recipe).with_changes({"targets.on_missing": "compute"})
    selection = Selection("" if stage == "all" else stage, shard, force)
    prepared = prepare_corpus(open_workspace(recipe), selection)
    if shard and not prepared.stages and not selection.named(prepared.workspace.lineage):
        raise FatalError(
            f"no shard {shard!r} in {selection.stage or 'any stage'} of {recipe.name}; `distil status` lists them"
        )
    lacking = [
        ref
        for ref in silently_missing(prepared)
        if selection.stage in ("", ref.kind) and shard in ("", ref.label, plain_label(ref.label))
    ]
    if lacking and not prepared.failures:
        first = lacking[0]
        raise FatalError(
            f"{first.kind} {first.label} is still missing, because an artifact that it is made from is missing; "
            "run `distil retry` without --stage and --shard"
        )
    return finish_state(prepared, command)


retry_shard = bound_flow(run_retry, "retry-shard", run_name="{name} {stage} {shard}")
