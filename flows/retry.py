"""Makes missing artifacts: all of them, or those of one stage or one shard.

    distil retry RECIPE.toml --stage targets --shard fr_meta_part_3-0002
    flows/retry.py:retry_shard                      entry point of the deployments `retry-shard/NAME`

Runs the stages of the flow `prepare`. Existing artifacts are made again only with `force`.
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
    """Makes missing shards, blocks and targets: all of them, or those of one stage or one shard.

    Args:
        recipe: The recipe of the shard.
        stage: The stage to retry, as in `distil status`; "all" selects every stage up to the targets.
        shard: Label of a shard or source, as in `distil status`. Leave it empty for all missing artifacts.
        force: Make the artifacts again even if they exist. Requires a stage or a shard.
        command: Recipe file and settings as typed at the command line. Leave it empty for a run of a deployment.
    """
    if stage not in get_args(Stage):
        raise FatalError(f"stage {stage!r} does not exist; choose one of {', '.join(get_args(Stage))}")
    if force and stage == "all" and not shard:
        raise FatalError("force would make every artifact again; select a stage or a shard")
    # A retry computes missing targets even if the recipe's runs do not.
    recipe = with_absolute_paths(recipe).with_changes({"targets.on_missing": "compute"})
    selection = Selection("" if stage == "all" else stage, shard, force)
    prepared = prepare_corpus(open_workspace(recipe), selection)
    if shard and not prepared.stages and not selection.exists_in(prepared.workspace.lineage):
        raise FatalError(
            f"{recipe.name} has no shard named {shard!r} in {selection.stage or 'any stage'}; use a label that "
            "`distil status` lists as missing or failed"
        )
    lacking = [
        ref
        for ref in silently_missing(prepared)
        if selection.stage in ("", ref.kind) and shard in ("", ref.label, plain_label(ref.label))
    ]
    if lacking and not prepared.failures:
        first = lacking[0]
        raise FatalError(
            f"{first.kind} {first.label} is still missing because one of its input artifacts is missing; "
            "run `distil retry` without --stage and --shard"
        )
    return finish_state(prepared, command)


retry_shard = bound_flow(run_retry, "retry-shard", run_name="{name} {stage} {shard}")
