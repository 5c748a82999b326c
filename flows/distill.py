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
from flows.inventory import plan
from flows.pipeline.bind import bound_flow, run_one
from flows.pipeline.finished import all_done, remember, show_done
from flows.pipeline.preparation import Prepared, failed_state, prepare_corpus, unexplained
from flows.pipeline.remote_text import make_text_elsewhere
from flows.pipeline.trainer_process import Line, launch
from flows.release.card import Result, describe
from flows.release.champion import score_champion
from flows.release.gate import Judgement, gate, gate_rows
from flows.release.standings import record_standings
from flows.scoring.candidates import Candidate, Judged, control_of, protocol_of
from flows.scoring.compute import failure_sentence, score_models
from flows.scoring.record import record_scores
from flows.tracking.registry import Version
from flows.tracking.runs import Book, open_book
from flows.views.artifacts import publish_failures, publish_sheet
from flows.views.summary import Course, sections
from flows.views.tables import bar, markdown_sheet, show_sheet
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.models.files import scored_as
from tasks.recipe.config import Recipe
from tasks.recipe.load import placed
from tasks.recipe.run_spec import METRICS, RunSpec
from tasks.release.results import protocols, standings
from tasks.train.metrics import read_metrics

SEND_SECONDS = 5.0
"""Curves are sent to MLflow this often."""


def run_chain(recipe: Recipe) -> State[Any]:
    """Distils a student of a teacher: shards, blocks and targets, then training, registration and scores.

    Args:
        recipe: Everything that the run needs to know, section by section as in a recipe file.
    """
    recipe = placed(recipe)
    store = open_store(recipe)
    done = all_done(store, recipe)
    if done:
        show_done(store, recipe, done)
        return Completed(message=done.sentence)
    protocol_of(recipe)  # a protocol or control that cannot be used is refused before hours of other work
    control_of(recipe)
    start = time.monotonic()
    make_text_elsewhere(store, recipe)
    prepared = prepare_corpus(store, recipe, training=True)
    publish_failures(recipe, prepared.failures)
    if prepared.too_many_failed(recipe):
        return failed_state(prepared.failures)
    _refuse_gaps(store, recipe, prepared)
    course = _student(store, recipe, prepared)
    _show(store, course, time.monotonic() - start)
    failed = f"; {len(prepared.failures)} failed before it, see the table" if prepared.failures else ""
    return Completed(message=f"{course.mlflow_model}{failed}")


distill = bound_flow(run_chain, "distill", run_name="{name}")


def _refuse_gaps(store: Store, recipe: Recipe, prepared: Prepared) -> None:
    """FatalError if something is missing that nobody reported: a model must not lack text in silence."""
    lacking = unexplained(store, prepared)
    if lacking and recipe.targets.on_missing == "compute":
        first = lacking[0]
        raise FatalError(
            f"{len(lacking)} artifacts are missing although nothing failed, the first is {first.kind} {first.label}; "
            "run `distil verify`, then `distil retry`"
        )


def _student(store: Store, recipe: Recipe, prepared: Prepared) -> Course:
    """Trains, registers and scores, under one MLflow run."""
    run = plan(store, recipe, prepared.lineage)
    book = open_book(recipe)
    parent = _parent_run(book, recipe, run, prepared)
    seconds = {stage.stage: stage.seconds for stage in prepared.stages}
    with book.ending(parent):
        with _timed(seconds, "train"):
            run_one("train", recipe.name, partial(_train, store, book, parent, run), recipe.run)
        model = Candidate("student", run.model_ref.key, store.check(store.receipt(run.model_ref)))
        with _timed(seconds, "register"):
            version = run_one("register", recipe.name, partial(_register, book, parent, recipe, model), recipe.run)
        with _timed(seconds, "score"):
            judged = _judge(store, recipe, model, prepared)
            record_scores(book, parent, run.run_key, judged)
            if judged.failures:
                raise FatalError(failure_sentence(judged))
    with _timed(seconds, "card and gate"):
        judgement = _conclude(store, book, parent, Result(recipe, prepared.lineage, run, version, judged.scores))
    return Course(
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


def _judge(store: Store, recipe: Recipe, student: Candidate, prepared: Prepared) -> Judged:
    """Scores of the student and of the recipe's control, beside the teacher."""
    # By its content, as `distil score` names any folder: what is scored here is not scored again there.
    student = replace(student, key=scored_as(student.folder, trust_remote_code=recipe.teacher.trust_remote_code))
    control = control_of(recipe)
    models = [student, *([control] if control else [])]
    heldout = {model.name: (recipe, prepared.lineage.heldout_blocks) for model in models}
    return score_models(store, recipe, models, heldout)


def _conclude(store: Store, book: Book, parent: str, result: Result) -> Judgement:
    """Standings, card and picture beside the version, then the gate, which may wait for a person: nothing else does."""
    recipe, own = result.recipe, next(iter(result.scores.values()))
    version = record_standings(book.registry, result.version, standings(own), protocols(own))
    run_one("card", recipe.name, partial(describe, store, book, parent, result), recipe.run)
    score_champion(store, book.registry, result)
    return gate(recipe, book.registry, version)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _parent_run(book: Book, recipe: Recipe, run: RunSpec, prepared: Prepared) -> str:
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


def _train(store: Store, book: Book, parent: str, run: RunSpec) -> None:
    """Trains unless the model is there, with a bar and the curves on their way to MLflow."""
    child = book.run("train", run.run_key, f"{run.name} train", parent=parent)
    if store.has(run.model_ref):
        # A run that was killed right after its training may still owe MLflow the end of the curve.
        book.send(child, read_metrics(Path(run.folder) / METRICS), book.last_steps(child))
        book.end(child)
        return
    with book.ending(child), bar("train", run.total_steps) as advance:
        launch(run, _Follower(book, child, advance).follow)


class _Follower:
    """Takes the lines of metrics.jsonl to the bar at once and to MLflow now and then."""

    def __init__(self, book: Book, run_id: str, advance: Any) -> None:
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


def _register(book: Book, parent: str, recipe: Recipe, model: Candidate) -> Version:
    sentence = recipe.score.sentences[0] if recipe.score.sentences else "<mask>"
    name, trusted = recipe.register_as.name, recipe.teacher.trust_remote_code
    return book.registry.register(parent, name, model.key, model.folder, sentence, _prefect_tags(), trusted)


def _show(store: Store, course: Course, seconds: float) -> None:
    """The final table: printed, as an artifact in Prefect, and remembered for a second run with nothing to do."""
    sheet = sections(store, course, seconds)
    show_sheet(course.recipe.name, sheet)
    publish_sheet(markdown_sheet(course.recipe.name, sheet), course.mlflow_url)
    remember(store, course.recipe, course.run, sheet)
