"""Wanted, there, missing; what gc keeps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flows.home import REGISTERED
from storage.artifact import Ref
from storage.errors import FatalError
from storage.lease import leased_artifacts
from storage.store import Store
from tasks.lineage import Lineage, plan_training, trace, training_key
from tasks.recipe.config import Recipe
from tasks.recipe.run_spec import RunSpec
from tasks.recipe.run_spec import model_ref as ref_of_model


def planned_training(store: Store, recipe: Recipe, lineage: Lineage) -> RunSpec:
    """The training run of a recipe. FatalError: train.warm_start names no model."""
    return plan_training(store, with_local_start(recipe), lineage)


def planned_key(recipe: Recipe, lineage: Lineage) -> str:
    """The key of that run where nothing of the lineage is missing. The same error."""
    return training_key(with_local_start(recipe), lineage)


def planned_model(recipe: Recipe, lineage: Lineage) -> Ref:
    """Names the model that it ends with. The same error."""
    return ref_of_model(planned_key(recipe, lineage), recipe.name)


def with_local_start(recipe: Recipe) -> Recipe:
    """The recipe, with a registered model in train.warm_start replaced by its folder."""
    if not recipe.train.warm_start.startswith(REGISTERED):
        return recipe
    # Deferred: it imports MLflow, which takes seconds and which most recipes do not need here.
    from flows.tracking.registry import fetch_model

    folder = fetch_model(recipe, recipe.train.warm_start)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"warm_start": str(folder)})})


@dataclass(frozen=True)
class StageRow:
    """One stage: how many artifacts are wanted and done, labels of the missing, label and reason of the failed."""

    stage: str
    wanted: int
    done: int
    bytes: int
    missing: tuple[str, ...]
    failed: Mapping[str, str]


def stage_rows(store: Store, recipe: Recipe) -> list[StageRow]:
    """One row a stage of the chain, from two listings a kind. What has no key before
    something else is made is not in."""
    lineage = trace(store, recipe)
    unread = tuple(source.label for source, ref in lineage.sources if ref is None)
    rows = [_row(store, stage, refs, unread if stage == "source" else ()) for stage, refs in lineage.stages().items()]
    whole = lineage.shards and all(row.done == row.wanted for row in rows)
    found = planned_model(recipe, lineage) if whole else None
    return [*rows, _row(store, "model", (found,) if found else (), ())]


def _row(store: Store, stage: str, refs: Iterable[Ref], unread: tuple[str, ...]) -> StageRow:
    """`unread` are labels of sources that have no key yet."""
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


def model_ref(store: Store, recipe: Recipe, lineage: Lineage) -> Ref | None:
    """The model that the recipe ends with, once all that it is made of is there."""
    if not lineage.shards or lineage.lacks(store):
        return None
    return planned_model(recipe, lineage)


def artifacts_to_keep(store: Store, recipes: Iterable[Recipe]) -> set[tuple[str, str]]:
    """What `gc` must keep: all that the recipes want, their samples, every model and score, the checkpoints of
    trainings that have not ended, and what those read that go on, of whatever snapshot."""
    from tasks.train.checkpoint import unfinished_checkpoints  # deferred: torch takes seconds to import

    keep = {(kind, key) for kind in ("model", "scores") for key in store.keys(kind)}
    keep |= {("checkpoint", key) for key in unfinished_checkpoints(store)}
    keep |= leased_artifacts(store)
    for recipe in recipes:
        lineage = trace(store, recipe)
        unread = [source.label for source, ref in lineage.sources if ref is None or not store.has(ref)]
        if unread:
            raise FatalError(
                f"recipe {recipe.name}: source {unread[0]} is not done, so it is not known what belongs to it and gc "
                "could drop too much; run `distil retry` first"
            )
        keep |= {(ref.kind, ref.key) for refs in lineage.stages().values() for ref in refs}
        keep |= {(ref.kind, ref.key) for ref in lineage.sample}
    return keep
