"""Compares a recipe with its store: the planned training run, and the required, finished and missing artifacts.

run = planned_training(workspace)
rows = stage_rows(workspace)            # per stage: numbers of required and finished artifacts, bytes, missing, failed
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flows.home import REGISTERED
from storage.artifact import Ref
from storage.store import Store
from tasks.lineage import Workspace, plan_training, training_key, training_key_schema_1
from tasks.recipe.run_json import RunSpec, model_ref


def planned_training(workspace: Workspace) -> RunSpec:
    """Plans the training run of a recipe. FatalError: train.warm_start is not the name of a model."""
    return plan_training(with_local_start(workspace))


def planned_key(workspace: Workspace) -> str:
    """Returns the key of the run that `planned_training` plans once no artifact is missing. Raises the same error."""
    return training_key(with_local_start(workspace))


def planned_model(workspace: Workspace) -> Ref:
    """Returns a reference to the model of the planned training run. Raises the same error."""
    return model_ref(planned_key(workspace), workspace.recipe.name)


def trained_under_schema_1(workspace: Workspace) -> bool:
    """Returns True if the store has this recipe's model as trained under run schema 1. Raises the same error."""
    recipe = workspace.recipe
    if recipe.train.result != "last":
        return False  # schema 1 supported no other value
    key = training_key_schema_1(with_local_start(workspace))
    return workspace.store.has(model_ref(key, recipe.name))


def with_local_start(workspace: Workspace) -> Workspace:
    """Returns the workspace; a registered model in train.warm_start is downloaded and replaced by its folder."""
    recipe = workspace.recipe
    if not recipe.train.warm_start.startswith(REGISTERED):
        return workspace
    # Deferred: importing MLflow takes seconds, and most recipes do not need it here.
    from flows.tracking.model_registry import fetch_model

    return workspace.with_warm_start(str(fetch_model(recipe, recipe.train.warm_start)))


@dataclass(frozen=True)
class StageRow:
    """Progress of one stage.

    Contains the numbers of required (`wanted`) and finished (`done`) artifacts, the bytes of the finished ones, the
    labels of the missing ones, and the error message of each failed one by label.
    """

    stage: str
    wanted: int
    done: int
    bytes: int
    missing: tuple[str, ...]
    failed: Mapping[str, str]


def stage_rows(workspace: Workspace) -> list[StageRow]:
    """Returns one row per stage, from two listings of the store per artifact kind.

    Artifacts whose keys depend on missing artifacts are not counted.
    """
    store, lineage = workspace.store, workspace.lineage
    unread = tuple(source.label for source, ref in lineage.sources if ref is None)
    rows = [_row(store, stage, refs, unread if stage == "source" else ()) for stage, refs in lineage.stages().items()]
    complete = lineage.shards and all(row.done == row.wanted for row in rows)
    return [*rows, _row(store, "model", (planned_model(workspace),) if complete else (), ())]


def _row(store: Store, stage: str, refs: Iterable[Ref], unread: tuple[str, ...]) -> StageRow:
    """Returns the row of one stage. `unread` contains the labels of sources that have no key yet."""
    wanted = {ref.key: ref.label for ref in refs}
    there = store.sizes(stage)
    done = there.keys() & wanted.keys()
    failures = {failure.key: failure.message for failure in store.failures(stage)}
    absent = {key: label for key, label in wanted.items() if key not in done}
    return StageRow(
        stage=stage,
        wanted=len(wanted) + len(unread),
        done=len(done),
        bytes=sum(there[key] for key in done),
        missing=(*unread, *(label for key, label in absent.items() if key not in failures)),
        failed={label: failures[key] for key, label in absent.items() if key in failures},
    )


def planned_model_if_prepared(workspace: Workspace) -> Ref | None:
    """Returns a reference to the recipe's model, or None if an artifact that the model is made from is missing."""
    if not workspace.lineage.shards or workspace.lineage.lacks(workspace.store):
        return None
    return planned_model(workspace)
