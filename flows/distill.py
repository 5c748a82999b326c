"""The whole chain as one Prefect flow: corpus to targets, training, registration, scores, gate.

    distil run RECIPE.toml                          from the command line
    flows/distill.py:distill                        entry point of the deployments `distill/NAME`

Running it again computes only what is missing; a run that was killed goes on where it was.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, get_run_logger, runtime
from prefect.states import Completed

from flows.home import link_model, open_store
from flows.inventory import planned_training
from flows.pipeline.finished import all_done, remember_done, show_done
from flows.pipeline.preparation import Prepared, failed_state, prepare_corpus, silently_missing
from flows.pipeline.remote_text import prepare_text_remotely
from flows.pipeline.task_policy import bound_flow, run_one
from flows.pipeline.trainer_process import Line, launch_trainer
from flows.release.card import TrainedModel, publish_card
from flows.release.champion import score_champion
from flows.release.gate import GateDecision, decide_in_flow, gate_rows
from flows.release.version_results import record_results
from flows.scoring.compute import failure_sentence, score_models
from flows.scoring.evaluated_models import EvaluatedModel, ScoredModels, control_of, protocol_of
from flows.scoring.record import record_scores
from flows.tracking.registry import Version
from flows.tracking.runs import MlflowRuns, open_mlflow_runs
from flows.views.prefect_artifacts import publish_failures, publish_sheet
from flows.views.summary import RunSummary, sections
from flows.views.tables import bar, markdown_sheet, show_sheet
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.models.files import model_content_key
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths
from tasks.recipe.run_spec import METRICS, RunSpec
from tasks.release.results import protocol_keys, set_results
from tasks.train.metrics import read_metrics

SEND_SECONDS = 5.0
"""Curves are sent to MLflow this often."""


def run_chain(recipe: Recipe) -> State[Any]:
    """Distils a student of a teacher: shards, blocks and targets, then training, registration and scores.

    Args:
        recipe: Everything that the run needs to know, section by section as in a recipe file.
    """
    recipe = with_absolute_paths(recipe)
    store = open_store(recipe)
    done = all_done(store, recipe)
    if done:
        show_done(store, recipe, done)
        return Completed(message=done.sentence)
    protocol_of(recipe)  # a protocol or control that cannot be used is refused before hours of other work
    control_of(recipe)
    start = time.monotonic()
    prepare_text_remotely(store, recipe)
    prepared = prepare_corpus(store, recipe, training=True)
    publish_failures(recipe, prepared.failures)
    if prepared.too_many_failed(recipe):
        return failed_state(prepared.failures)
    _refuse_gaps(store, recipe, prepared)
    course = _train_and_score(store, recipe, prepared)
    _show(store, course, time.monotonic() - start)
    failed = f"; {len(prepared.failures)} failed before it, see the table" if prepared.failures else ""
    return Completed(message=f"{course.mlflow_model}{failed}")


distill = bound_flow(run_chain, "distill", run_name="{name}")


def _refuse_gaps(store: Store, recipe: Recipe, prepared: Prepared) -> None:
    """FatalError if something is missing that nobody reported: a model must not lack text in silence."""
    lacking = silently_missing(store, prepared)
    if lacking and recipe.targets.on_missing == "compute":
        first = lacking[0]
        raise FatalError(
            f"{len(lacking)} artifacts are missing although nothing failed, the first is {first.kind} {first.label}; "
            "run `distil verify`, then `distil retry`"
        )


def _train_and_score(store: Store, recipe: Recipe, prepared: Prepared) -> RunSummary:
    """Trains, registers and scores, under one MLflow run."""
    run = planned_training(store, recipe, prepared.lineage)
    book = open_mlflow_runs(recipe)
    parent = _parent_run(book, recipe, run, prepared)
    seconds = {stage.stage: stage.seconds for stage in prepared.stages}
    with book.ending(parent):
        with _timed(seconds, "train"):
            run_one("train", recipe.name, partial(_train, store, book, parent, run), recipe.run)
        model = EvaluatedModel("student", run.model_ref.key, store.check(store.receipt(run.model_ref)))
        with _timed(seconds, "register"):
            version = run_one("register", recipe.name, partial(_register, book, parent, recipe, model), recipe.run)
        with _timed(seconds, "score"):
            judged = _score(store, recipe, model, prepared)
            record_scores(book, parent, run.run_key, judged)
            if judged.failures:
                raise FatalError(failure_sentence(judged))
    with _timed(seconds, "card and gate"):
        judgement = _publish_and_gate(
            store, book, parent, TrainedModel(recipe, prepared.lineage, run, version, judged.scores)
        )
    return RunSummary(
        recipe=recipe,
        lineage=prepared.lineage,
        run=run,
        model_folder=link_model(recipe, model.folder),
        mlflow_model=", alias ".join(filter(None, [str(version), ", ".join(book.registry.aliases_of(version))])),
        mlflow_uri=book.uri,
        mlflow_run=parent,
        mlflow_url=book.url(parent),
        scores=judged.scores[model.name],
        stage_seconds=seconds,
        gate=gate_rows(judgement),
    )


def _score(store: Store, recipe: Recipe, student: EvaluatedModel, prepared: Prepared) -> ScoredModels:
    """Scores of the student and of the recipe's control, beside the teacher."""
    # By its content, as `distil score` names any folder: what is scored here is not scored again there.
    student = replace(
        student, key=model_content_key(student.folder, trust_remote_code=recipe.teacher.trust_remote_code)
    )
    control = control_of(recipe)
    models = [student, *([control] if control else [])]
    heldout = {model.name: (recipe, prepared.lineage.heldout_blocks) for model in models}
    return score_models(store, recipe, models, heldout)


def _publish_and_gate(store: Store, book: MlflowRuns, parent: str, result: TrainedModel) -> GateDecision:
    """Standings, card and picture beside the version, then the gate, which may wait for a person: nothing else does."""
    recipe, own = result.recipe, next(iter(result.scores.values()))
    version = record_results(book.registry, result.version, set_results(own), protocol_keys(own))
    run_one("card", recipe.name, partial(publish_card, store, book, parent, result), recipe.run)
    score_champion(store, book.registry, result)
    return decide_in_flow(recipe, book.registry, version)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _parent_run(book: MlflowRuns, recipe: Recipe, run: RunSpec, prepared: Prepared) -> str:
    """The MLflow run of this result, with settings, data sets and the way back to Prefect."""
    parent = book.run("chain", run.run_key, recipe.name, settings=recipe.model_dump(mode="json", by_alias=True))
    book.tag(parent, _prefect_tags())
    manifest = sha256_bytes(canonical_json([part.model_dump() for part in run.manifest]))
    snapshot = prepared.lineage.snapshot
    book.data(parent, {"snapshot": (snapshot.fingerprint, snapshot.url), "manifest": (manifest, recipe.store)})
    return parent


def _prefect_tags() -> dict[str, str]:
    return {
        "distil.prefect_run_id": str(runtime.flow_run.id or ""),
        "distil.prefect_run_url": str(runtime.flow_run.ui_url or ""),
    }


def _train(store: Store, book: MlflowRuns, parent: str, run: RunSpec) -> None:
    """Trains unless the model is there, with a bar and the curves on their way to MLflow."""
    child = book.run("train", run.run_key, f"{run.name} train", parent=parent)
    if store.has(run.model_ref):
        # A run that was killed right after its training may still owe MLflow the end of the curve.
        book.send(child, read_metrics(Path(run.folder) / METRICS), book.last_steps(child))
        book.end(child)
        return
    with book.ending(child), bar("train", run.total_steps) as advance:
        launch_trainer(run, _MetricsFollower(book, child, advance).follow)


class _MetricsFollower:
    """Takes the lines of metrics.jsonl to the bar at once and to MLflow now and then."""

    def __init__(self, book: MlflowRuns, run_id: str, advance: Any) -> None:
        self.book, self.run_id, self.advance = book, run_id, advance
        self.last = book.last_steps(run_id)
        self.step = 0
        self.owed: list[Line] = []
        self.sent = 0.0

    def follow(self, lines: list[Line], final: bool = False) -> None:
        """`lines` are new ones; `final`: nothing comes after them."""
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
                self.book.send(self.run_id, self.owed, self.last)
                self.owed = []
            except RetryableError as error:
                # The lines are kept and are sent again; a training does not end because MLflow is away.
                get_run_logger().warning(error.message)


def _register(book: MlflowRuns, parent: str, recipe: Recipe, model: EvaluatedModel) -> Version:
    sentence = recipe.score.sentences[0] if recipe.score.sentences else "<mask>"
    name, trusted = recipe.register_as.name, recipe.teacher.trust_remote_code
    return book.registry.register(parent, name, model.key, model.folder, sentence, _prefect_tags(), trusted)


def _show(store: Store, course: RunSummary, seconds: float) -> None:
    """The final table: printed, as an artifact in Prefect, and remembered for a second run with nothing to do."""
    sheet = sections(store, course, seconds)
    show_sheet(course.recipe.name, sheet)
    publish_sheet(markdown_sheet(course.recipe.name, sheet), course.mlflow_url)
    remember_done(store, course.recipe, course.run, sheet)
