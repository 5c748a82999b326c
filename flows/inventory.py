"""A recipe's artifacts against the store: planned training run, wanted and missing artifacts.

run = planned_training(workspace)
rows = stage_rows(workspace)            # per stage: wanted, done, bytes, missing, failed
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flows.home import REGISTERED
from storage.artifact import Ref
from storage.store import Store
from tasks.lineage import Workspace, plan_training, training_key, training_key_schema_1
from tasks.recipe.run_json import RunSpec
from tasks.recipe.run_json import model_ref as ref_of_model


def planned_training(workspace: Workspace) -> RunSpec:
    """The training run of a recipe. FatalError: train.warm_start names no model."""
    return plan_training(with_local_start(workspace))


def planned_key(workspace: Workspace) -> str:
    """Key of the run that `planned_training` returns if no artifact is missing. The same error."""
    return training_key(with_local_start(workspace))


def planned_model(workspace: Workspace) -> Ref:
    """Reference to the model of that run. The same error."""
    return ref_of_model(planned_key(workspace), workspace.recipe.name)


def trained_under_schema_1(workspace: Workspace) -> bool:
    """True if a version with run schema 1 has trained this recipe in this store. The same error."""
    recipe = workspace.recipe
    if recipe.train.result != "last":
        return False  # schema 1 had no other result
    key = training_key_schema_1(with_local_start(workspace))
    return workspace.store.has(ref_of_model(key, recipe.name))


def with_local_start(workspace: Workspace) -> Workspace:
    """The workspace, with a registered model in train.warm_start replaced by its folder."""
    recipe = workspace.recipe
    if not recipe.train.warm_start.startswith(REGISTERED):
        return workspace
    # Deferred: it imports MLflow, which takes seconds and which most recipes do not need here.
    from flows.tracking.model_registry import fetch_model

    return workspace.with_warm_start(str(fetch_model(recipe, recipe.train.warm_start)))


@dataclass(frozen=True)
class StageRow:
    """One stage: wanted and done artifacts, bytes of the done, labels of the missing, reasons of the failed."""

    stage: str
    wanted: int
    done: int
    bytes: int
    missing: tuple[str, ...]
    failed: Mapping[str, str]


def stage_rows(workspace: Workspace) -> list[StageRow]:
    """One row per stage, from two listings per kind.

    Artifacts whose keys depend on artifacts that do not exist yet are not counted.
    """
    store, lineage = workspace.store, workspace.lineage
    unread = tuple(source.label for source, ref in lineage.sources if ref is None)
    rows = [_row(store, stage, refs, unread if stage == "source" else ()) for stage, refs in lineage.stages().items()]
    complete = lineage.shards and all(row.done == row.wanted for row in rows)
    return [*rows, _row(store, "model", (planned_model(workspace),) if complete else (), ())]


def _row(store: Store, stage: str, refs: Iterable[Ref], unread: tuple[str, ...]) -> StageRow:
    """`unread` holds labels of sources that have no key yet."""
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


def model_ref(workspace: Workspace) -> Ref | None:
    """Reference to the recipe's model, or None while an artifact that it is made from is missing."""
    if not workspace.lineage.shards or workspace.lineage.lacks(workspace.store):
        return None
    return planned_model(workspace)
