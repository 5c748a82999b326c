"""Scores models side by side: held-out text, fill-mask, size and speed, and fine-tuned data sets.

    distil score MODEL... [RECIPE.toml]             from the command line: folders, hub ids or registered models
    flows/score.py:score                            entry point of the deployments `score/NAME`

Scores are artifacts keyed by model, protocol, data set and seed, so none is computed twice. A score that cannot be
computed is reported as `not run`, with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed

from flows.home import REGISTERED, open_workspace
from flows.pipeline.preparation import failed_state, prepare_heldout
from flows.pipeline.task_policy import bound_flow
from flows.release.card import FIGURE
from flows.release.version_results import record_results
from flows.scoring.compute_scores import failure_sentence, score_models
from flows.scoring.evaluated_models import (
    EvaluatedModel,
    ScoredModels,
    find_model,
    protocol_of,
    teacher_of,
    with_tokenizer_of,
)
from flows.scoring.finetuned import SeedSelection
from flows.scoring.record_scores import record_scores
from flows.tracking.mlflow_runs import open_mlflow_runs
from flows.views.comparison import comparison_table, fill_mask_table, notes
from flows.views.prefect_artifacts import best_effort, publish_failures
from flows.views.tables import Table, markdown, show_table
from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths
from tasks.release.figure import render_figure
from tasks.release.results import TEACHER, protocol_keys, results_of_sets, summarize_models

# ---- the flow ----------------------------------------------------------------------------------------------


def run_score(
    recipe: Recipe, model: str, others: tuple[str, ...] = (), only: str = "", force: bool = False, command: str = ""
) -> State[Any]:
    """Scores masked language models side by side on the held-out text and by the protocol of a recipe.

    Args:
        recipe: The recipe with the held-out text, the teacher and the score settings.
        model: A folder, a hub id, or a registered model such as models:/distilled@challenger.
        others: More models to compare, scored by the same protocol.
        only: Compute only this data set (xnli) or one seed of it (xnli seed 1). Leave it empty for all missing scores.
        force: Compute the scores of `only` again even if they exist.
        command: Recipe file and settings as typed at the command line. Leave it empty for a run of a deployment.
    """
    if force and not only:
        raise FatalError(
            "force would compute every score again; set `only` to a data set (xnli) or to one seed of it (xnli seed 1)"
        )
    recipe = with_absolute_paths(recipe)
    protocol_of(recipe)  # an unusable protocol fails before anything is computed
    workspace = open_workspace(recipe)
    models = _evaluated_models(recipe, (model, *others))
    heldout: dict[str, Workspace] = {}
    for one in models:
        prepared = prepare_heldout(Workspace(workspace.store, with_tokenizer_of(recipe, one.folder)))
        publish_failures(recipe, prepared.failures, command)
        if prepared.too_many_failed:
            return failed_state(prepared.failures)
        heldout[one.name] = prepared.workspace
    scored = score_models(workspace, models, heldout, SeedSelection(only, force))
    title = ", ".join(one.name for one in models)
    _show(title, scored)
    record(workspace, models, scored)
    if scored.failures:
        return Failed(message=failure_sentence(scored))
    return Completed(message=f"{title} scored")


score = bound_flow(run_score, "score", run_name="{model}")


def _evaluated_models(recipe: Recipe, models: Sequence[str]) -> list[EvaluatedModel]:
    """Returns each model once, with a unique short name.

    The recipe's teacher, which every model is compared with, is removed from the list unless it is the only model.
    """
    found: dict[str, EvaluatedModel] = {}
    for model in models:
        one = find_model(recipe, model)
        found.setdefault(one.key, replace(one, name=_short_name(model, {other.name for other in found.values()})))
    teacher = teacher_of(recipe)
    students = [one for key, one in found.items() if not teacher or key != teacher.key]
    return students or [replace(one, name=TEACHER) for one in found.values()]


def _short_name(model: str, taken: set[str]) -> str:
    """Returns a short name that is not in `taken`.

    It is `distil-demo-challenger` for models:/distil-demo@challenger, and the last part of the path of a folder or hub
    id. It is used in names in MLflow, which must not contain @.
    """
    plain = model.removeprefix(REGISTERED) if model.startswith(REGISTERED) else Path(model.rstrip("/")).name
    name = re.sub(r"[^\w.-]", "-", plain)
    number = 2
    unique = name
    while unique in taken | {TEACHER}:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _show(title: str, scored: ScoredModels) -> None:
    """Prints the tables of all models and publishes them as a Prefect artifact."""
    answers = fill_mask_table(scored.scores)
    notes_table = Table("Notes", {"": notes(scored.scores)}, ("about", "note"))
    tables = [comparison_table(title, scored.scores), *([answers] if answers else []), notes_table]
    for table in tables:
        show_table(table)
    with best_effort():
        create_markdown_artifact(markdown(*tables), "scores", f"Scores of {title}")


def record(workspace: Workspace, models: Sequence[EvaluatedModel], scored: ScoredModels) -> None:
    """Records the comparison as one MLflow run with a figure and one child run per model and data set.

    Results of this recipe's registered models are also stored with their versions, where the gate reads them.
    """
    recipe = workspace.recipe
    mlflow_runs = open_mlflow_runs(recipe)
    protocol = protocol_of(recipe)
    settings = protocol.model_dump(mode="json") if protocol else {}
    key = sha256_bytes(canonical_json([[model.key for model in models], workspace.teacher_fingerprint, settings]))
    names = ", ".join(model.name for model in models)
    parent = mlflow_runs.start_or_resume_run(
        "scores", key, f"scores {names}", settings={"models": names, "protocol": settings}
    )
    with mlflow_runs.ending(parent):
        record_scores(mlflow_runs, parent, key, scored)
        mlflow_runs.log_files(parent, {FIGURE: render_figure(names, summarize_models(scored.scores))})
    for model in models:
        if is_own(recipe, model.uri):
            own, registry = scored.scores[model.name], mlflow_runs.registry
            record_results(registry, registry.version_at(model.uri), results_of_sets(own), protocol_keys(own))


def is_own(recipe: Recipe, uri: str) -> bool:
    """Returns True if `uri` is a version of the model that this recipe registers.

    Only results of such a model are stored with its version: results on the held-out text of a different recipe would
    replace those that the gate needs.
    """
    name = re.split("[@/]", uri.removeprefix(REGISTERED), maxsplit=1)[0]
    return uri.startswith(REGISTERED) and name == recipe.register_as.name
