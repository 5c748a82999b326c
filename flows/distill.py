"""Runs the complete pipeline as one Prefect flow: corpus to targets, training, registration, scores and gate.

    distil run RECIPE.toml                          from the command line
    flows/distill.py:distill                        entry point of the deployments `distill/NAME`

A repeated run computes only missing artifacts; a killed run resumes from the store and its newest checkpoint.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, get_run_logger, runtime
from prefect.states import Completed

from flows.home import link_model, open_workspace
from flows.inventory import planned_training, trained_under_schema_1
from flows.pipeline.already_done import all_done, remember_done, show_done
from flows.pipeline.preparation import Prepared, failed_state, prepare_corpus, silently_missing
from flows.pipeline.remote_text import prepare_text_remotely
from flows.pipeline.task_policy import bound_flow, run_one
from flows.pipeline.trainer_process import Line, launch_trainer
from flows.release.card import TrainedModel, publish_card
from flows.release.gate import GateDecision, decide_in_flow, gate_rows
from flows.release.rescore_champion import score_champion
from flows.release.version_results import record_results
from flows.scoring.compute_scores import failure_sentence, score_models
from flows.scoring.evaluated_models import STUDENT, EvaluatedModel, ScoredModels, control_of, protocol_of
from flows.scoring.record_scores import record_scores
from flows.tracking.mlflow_runs import MlflowRuns, open_mlflow_runs
from flows.tracking.model_registry import Version
from flows.views.prefect_artifacts import publish_failures, publish_result
from flows.views.summary import RunSummary, summary_sections
from flows.views.tables import Table, bar, show_table
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.lineage import Workspace
from tasks.models.model_files import model_content_key
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths
from tasks.recipe.run_json import METRICS, RunSpec
from tasks.release.results import protocol_keys, results_of_sets
from tasks.train.metrics import read_metrics

SEND_SECONDS = 5.0
"""Seconds between two uploads of the training curves to MLflow."""

TRAINED_AGAIN = (
    "this version of distil orders the training data differently (run schema 2), so the model is trained again; text, "
    "blocks and targets are reused"
)


def run_distill(recipe: Recipe, command: str = "") -> State[Any]:
    """Distils a student from a teacher: shards, blocks, targets, training, registration, scores and gate.

    Existing artifacts are reused. If all exist, the run shows the stored result.

    Args:
        recipe: All settings of the run, by section, as in a recipe file.
        command: Recipe file and settings as typed at the command line. Leave it empty for a run of a deployment.
    """
    recipe = with_absolute_paths(recipe)
    workspace = open_workspace(recipe)
    done = all_done(workspace)
    if done:
        show_done(workspace, done, command)
        return Completed(message=done.sentence)
    protocol_of(recipe)  # an unusable protocol or control fails here, before hours of other work
    control_of(recipe)
    start = time.monotonic()
    prepared = prepare_corpus(prepare_text_remotely(workspace), training=True)
    publish_failures(recipe, prepared.failures, command)
    if prepared.too_many_failed:
        return failed_state(prepared.failures)
    _refuse_gaps(prepared)
    summary = _train_and_score(prepared, command)
    _show_and_remember(summary, time.monotonic() - start)
    failed = f"; {len(prepared.failures)} artifacts failed before training, see the table" if prepared.failures else ""
    return Completed(message=f"{summary.mlflow_model}{failed}")


distill = bound_flow(run_distill, "distill", run_name="{name}")


def _refuse_gaps(prepared: Prepared) -> None:
    """FatalError if an artifact is missing without a reported failure, so that no training text is lost silently."""
    lacking = silently_missing(prepared)
    if lacking and prepared.workspace.recipe.targets.on_missing == "compute":
        first = lacking[0]
        raise FatalError(
            f"{len(lacking)} artifacts are missing although no job failed (the first is {first.kind} {first.label}); "
            "run `distil verify`, then `distil retry`"
        )


def _train_and_score(prepared: Prepared, command: str) -> RunSummary:
    """Trains, registers and scores the student under one MLflow run, then runs the gate. Returns the summary."""
    workspace = prepared.workspace
    store, recipe = workspace.store, workspace.recipe
    run = planned_training(workspace)
    _explain_repeated_training(workspace, run)
    mlflow_runs = open_mlflow_runs(recipe)
    parent = _parent_run(mlflow_runs, workspace, run)
    seconds = {stage.stage: stage.seconds for stage in prepared.stages}
    with mlflow_runs.ending(parent):
        with _timed(seconds, "train"):
            run_one("train", recipe.name, partial(_train, store, mlflow_runs, parent, run), recipe.run)
        folder = store.verified_folder(store.receipt(run.model_ref))
        with _timed(seconds, "register"):
            register = partial(_register, mlflow_runs, parent, recipe, run.model_ref.key, folder)
            version = run_one("register", recipe.name, register, recipe.run)
        with _timed(seconds, "score"):
            scored = _score(workspace, folder)
            record_scores(mlflow_runs, parent, run.run_key, scored)
            if scored.failures:
                raise FatalError(failure_sentence(scored))
    with _timed(seconds, "card and gate"):
        decision = _publish_and_gate(mlflow_runs, parent, TrainedModel(workspace, run, version, scored.scores))
    aliases = ", ".join(mlflow_runs.registry.aliases_of(version))
    return RunSummary(
        workspace=workspace,
        run=run,
        model_folder=link_model(recipe, folder),
        mlflow_model=", alias ".join(filter(None, [str(version), aliases])),
        mlflow_uri=mlflow_runs.uri,
        mlflow_run=parent,
        mlflow_url=mlflow_runs.url(parent),
        scores=scored.scores[STUDENT],
        stage_seconds=seconds,
        gate=gate_rows(decision),
        command=command,
    )


def _explain_repeated_training(workspace: Workspace, run: RunSpec) -> None:
    """Logs and prints why the model is trained again, if an older version of distil has trained it in this store."""
    if not workspace.store.has(run.model_ref) and trained_under_schema_1(workspace):
        get_run_logger().info(TRAINED_AGAIN)
        print(TRAINED_AGAIN, file=sys.stderr)  # Prefect's log lines do not reach the terminal


def _score(workspace: Workspace, folder: Path) -> ScoredModels:
    """Scores the student in `folder`, the recipe's control (if it has one) and the teacher."""
    recipe = workspace.recipe
    # Keyed by content, as in `distil score`, so that neither repeats the scores of the other.
    key = model_content_key(folder, trust_remote_code=recipe.teacher.trust_remote_code)
    student = EvaluatedModel(STUDENT, key, folder)
    control = control_of(recipe)
    models = [student, *([control] if control else [])]
    return score_models(workspace, models, {model.name: workspace for model in models})


def _publish_and_gate(mlflow_runs: MlflowRuns, parent: str, result: TrainedModel) -> GateDecision:
    """Stores results, card and figure with the version, then runs the gate, which may wait for a user's approval."""
    recipe, own = result.workspace.recipe, next(iter(result.scores.values()))
    version = record_results(mlflow_runs.registry, result.version, results_of_sets(own), protocol_keys(own))
    run_one("card", recipe.name, partial(publish_card, mlflow_runs, parent, result), recipe.run)
    score_champion(mlflow_runs.registry, result)
    return decide_in_flow(recipe, mlflow_runs.registry, version)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _parent_run(mlflow_runs: MlflowRuns, workspace: Workspace, run: RunSpec) -> str:
    """Returns the id of the MLflow parent run, after logging settings, data sets and the link to Prefect."""
    recipe, snapshot = workspace.recipe, workspace.lineage.snapshot
    settings = recipe.model_dump(mode="json", by_alias=True)
    parent = mlflow_runs.start_or_resume_run("chain", run.run_key, recipe.name, settings=settings)
    mlflow_runs.set_tags(parent, _prefect_tags())
    manifest = sha256_bytes(canonical_json([part.model_dump() for part in run.manifest]))
    mlflow_runs.log_inputs(
        parent, {"snapshot": (snapshot.fingerprint, snapshot.url), "manifest": (manifest, recipe.store)}
    )
    return parent


def _prefect_tags() -> dict[str, str]:
    return {
        "distil.prefect_run_id": str(runtime.flow_run.id or ""),
        "distil.prefect_run_url": str(runtime.flow_run.ui_url or ""),
    }


def _train(store: Store, mlflow_runs: MlflowRuns, parent: str, run: RunSpec) -> None:
    """Trains the model unless it exists; shows a progress bar and sends the training curves to MLflow."""
    child = mlflow_runs.start_or_resume_run("train", run.run_key, f"{run.name} train", parent=parent)
    if store.has(run.model_ref):
        # A run killed right after its training may not have sent the end of the curves.
        mlflow_runs.log_curves(child, read_metrics(Path(run.folder) / METRICS), mlflow_runs.last_steps(child))
        mlflow_runs.end(child)
        return
    with mlflow_runs.ending(child), bar("train", run.total_steps) as advance:
        launch_trainer(run, _MetricsFollower(mlflow_runs, child, advance).follow)


class _MetricsFollower:
    """Passes new lines of metrics.jsonl to the progress bar immediately, and to MLflow every SEND_SECONDS."""

    def __init__(self, mlflow_runs: MlflowRuns, run_id: str, advance: Any) -> None:
        self.mlflow_runs, self.run_id, self.advance = mlflow_runs, run_id, advance
        self.last = mlflow_runs.last_steps(run_id)
        self.step = 0
        self.owed: list[Line] = []
        self.sent = 0.0

    def follow(self, lines: list[Line], final: bool = False) -> None:
        """Handles new lines; `final` is True for the last ones, which are sent immediately."""
        self.owed += lines
        trained = [line for line in lines if "loss" in line]
        if trained:
            newest = trained[-1]
            note = f"loss {newest['loss']:.3f}  {newest['tokens_per_second']:,.0f} tokens/s"
            self.advance(newest["step"] - self.step, note)
            self.step = newest["step"]
        if final or time.monotonic() - self.sent > SEND_SECONDS:
            self.sent = time.monotonic()
            try:
                self.mlflow_runs.log_curves(self.run_id, self.owed, self.last)
                self.owed = []
            except RetryableError as error:
                # The lines are sent with the next ones: an MLflow that does not respond must not end a training run.
                get_run_logger().warning(error.message)


def _register(mlflow_runs: MlflowRuns, parent: str, recipe: Recipe, model_key: str, folder: Path) -> Version:
    sentence = recipe.score.sentences[0] if recipe.score.sentences else "<mask>"
    name, trusted = recipe.register_as.name, recipe.teacher.trust_remote_code
    return mlflow_runs.registry.register(parent, name, model_key, folder, sentence, _prefect_tags(), trusted)


def _show_and_remember(summary: RunSummary, seconds: float) -> None:
    """Prints the final table, publishes it in Prefect, and stores it for later runs that have nothing left to do."""
    sections = summary_sections(summary, seconds)
    table = Table(summary.workspace.recipe.name, sections)
    show_table(table)
    publish_result(table, summary.mlflow_url)
    remember_done(summary.workspace, summary.run, sections)
