"""Scores of models side by side: held-out text, fill-mask, size and speed, fine-tuned sets. One flow and its parts.

    score(recipe, model, others)     flow: scores any folders, hub ids or registered models by the recipe's protocol
    score_models(store, recipe, …)   the same inside `distill`, after training
    deciding_scores(store, …)        only what the gate looks at, of a champion

Scores are artifacts by (model, protocol, set, seed): what is there is not computed again. What cannot be run says so.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed

from flows.home import REGISTERED, open_store
from flows.pipeline.preparation import failed_state, prepare_heldout
from flows.pipeline.task_policy import bound_flow
from flows.release.card import PICTURE
from flows.release.version_results import record_results
from flows.scoring.compute import failure_sentence, score_models
from flows.scoring.evaluated_models import (
    TEACHER,
    EvaluatedModel,
    ScoredModels,
    _same_tokenizer,
    find_model,
    protocol_of,
    teacher_of,
)
from flows.scoring.finetuned import SeedSelection
from flows.scoring.record import record_scores
from flows.tracking.runs import open_mlflow_runs
from flows.views.comparison import comparison_table, fill_mask_table, notes
from flows.views.prefect_artifacts import best_effort, publish_failures
from flows.views.tables import TextTable, markdown_tables, show_table
from storage.artifact import Ref
from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.lineage import teacher_key
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths
from tasks.release.figure import render_figure
from tasks.release.results import protocol_keys, set_results, summarize_models

# ---- the flow ----------------------------------------------------------------------------------------------


def run_score(
    recipe: Recipe, model: str, others: tuple[str, ...] = (), only: str = "", force: bool = False
) -> State[Any]:
    """Scores masked language models side by side by a recipe's protocol, on the recipe's held-out text.

    Args:
        recipe: Whose text, teacher and score settings are taken.
        model: A folder, a hub id, or a registered model such as models:/distilled@challenger.
        others: More models to compare, by the same protocol.
        only: Compute only this fine-tuned set (xnli) or pair (xnli seed 1); empty means all that are missing.
        force: With only, compute it again even if it is there.
    """
    if force and not only:
        raise FatalError(
            "force needs only, a set or a pair such as `xnli seed 1`, so that not everything is made again"
        )
    recipe = with_absolute_paths(recipe)
    protocol_of(recipe)  # refused before anything is computed
    store = open_store(recipe)
    models = _candidates(recipe, (model, *others))
    heldout: dict[str, tuple[Recipe, Sequence[Ref]]] = {}
    for candidate in models:
        own = _same_tokenizer(recipe, candidate.folder)
        prepared = prepare_heldout(store, own)
        publish_failures(recipe, prepared.failures)
        if prepared.too_many_failed(recipe):
            return failed_state(prepared.failures)
        heldout[candidate.name] = (own, prepared.lineage.heldout_blocks)
    judged = score_models(store, recipe, models, heldout, SeedSelection(only, force))
    title = ", ".join(candidate.name for candidate in models)
    _show(title, judged)
    record(recipe, models, judged)
    if judged.failures:
        return Failed(message=failure_sentence(judged))
    return Completed(message=f"{title} scored")


score = bound_flow(run_score, "score", run_name="{model}")


def _candidates(recipe: Recipe, models: Sequence[str]) -> list[EvaluatedModel]:
    """Every model once, with a short name of its own; the recipe's teacher only where nothing else is scored."""
    found: dict[str, EvaluatedModel] = {}
    for model in models:
        one = find_model(recipe, model)
        found.setdefault(one.key, replace(one, name=_short_name(model, {other.name for other in found.values()})))
    teacher = teacher_of(recipe)
    students = [one for key, one in found.items() if not teacher or key != teacher.key]
    return students or [replace(one, name=TEACHER) for one in found.values()]


def _short_name(model: str, taken: set[str]) -> str:
    """`distil-demo-challenger` for models:/distil-demo@challenger, `camembert-base` for a folder or hub id so named.

    It becomes part of names in MLflow, which allow no @.
    """
    plain = model.removeprefix(REGISTERED) if model.startswith(REGISTERED) else Path(model.rstrip("/")).name
    name = re.sub(r"[^\w.-]", "-", plain)
    number = 2
    unique = name
    while unique in taken | {TEACHER}:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _show(title: str, judged: ScoredModels) -> None:
    """The table of all models and the fill-mask sheet, printed and as an artifact."""
    sheet = fill_mask_table(judged.scores)
    tables: dict[str, TextTable] = {title: comparison_table(judged.scores)}
    tables |= {"Fill-mask": sheet} if sheet else {}
    tables |= {"Notes": (["about", "note"], notes(judged.scores))}
    for heading, table in tables.items():
        show_table(heading, table)
    with best_effort():
        create_markdown_artifact(markdown_tables(tables), "scores", f"Scores of {title}")


def record(recipe: Recipe, models: Sequence[EvaluatedModel], judged: ScoredModels) -> None:
    """One MLflow run for the comparison, with its picture and a child run for each model and set.

    A registered model of this recipe keeps its standings too, so that the gate can compare it with others.
    """
    book = open_mlflow_runs(recipe)
    protocol = protocol_of(recipe)
    settings = protocol.model_dump(mode="json") if protocol else {}
    key = sha256_bytes(canonical_json([[model.key for model in models], teacher_key(recipe), settings]))
    names = ", ".join(model.name for model in models)
    parent = book.run("scores", key, f"scores {names}", settings={"models": names, "protocol": settings})
    with book.ending(parent):
        record_scores(book, parent, key, judged)
        book.keep(parent, {PICTURE: render_figure(names, summarize_models(judged.scores))})
    for model in models:
        if is_own(recipe, model.uri):
            own = judged.scores[model.name]
            record_results(book.registry, book.registry.named(model.uri), set_results(own), protocol_keys(own))


def is_own(recipe: Recipe, uri: str) -> bool:
    """Whether a registered model is one of this recipe. Standings by the held-out text of another recipe would say
    nothing of it, and take the place of its own."""
    name = re.split("[@/]", uri.removeprefix(REGISTERED), maxsplit=1)[0]
    return uri.startswith(REGISTERED) and name == recipe.register_as.name
