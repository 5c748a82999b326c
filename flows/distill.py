"""The whole chain as one Prefect flow: corpus to targets, training, registration, scores.

    distil run RECIPE.toml                          from the command line
    flows/distill.py:distill                        entry point of the deployments `distill/NAME`

Running it again computes only what is missing; a run that was killed goes on where it was.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, get_run_logger, runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.states import Completed

from flows.bind import bound_flow, run_one
from flows.corpus import Prepared, failed_state, prepare_corpus, publish_failures, unexplained
from flows.finished import all_done, remember, warm_start
from flows.home import link_model, open_store, settled
from flows.launch import METRICS, Line, launch
from flows.report import bar, markdown_sheet, show_sheet
from flows.score import Candidate, record_scores, score_model
from flows.sheet import Course, sections
from flows.track import Book, Version, open_book
from storage.error import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.config import Recipe
from tasks.lineage import plan_run
from tasks.metrics import read_metrics
from tasks.run import RunSpec

SEND_SECONDS = 5.0
"""Curves are sent to MLflow this often."""


def run_chain(recipe: Recipe) -> State[Any]:
    """Distils a student of a teacher: shards, blocks and targets, then training, registration and scores.

    Args:
        recipe: Everything that the run needs to know, section by section as in a recipe file.
    """
    recipe = settled(recipe)
    store = open_store(recipe)
    done = all_done(store, recipe)
    if done:
        show_sheet(recipe.name, done.sheet)
        return Completed(message=done.sentence)
    start = time.monotonic()
    prepared = prepare_corpus(store, recipe)
    publish_failures(prepared.failures)
    if prepared.too_many_failed(recipe):
        return failed_state(prepared.failures)
    _refuse_gaps(store, recipe, prepared)
    course = _student(store, recipe, prepared)
    _show(store, course, time.monotonic() - start)
    failed = f"; {len(prepared.failures)} failed before it, see the table" if prepared.failures else ""
    return Completed(message=f"{course.mlflow_model}{failed}")


distill = bound_flow(run_chain, "distill", run_name="{recipe.name}")


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
    run = plan_run(store, recipe, prepared.lineage, warm_start=warm_start(recipe))
    book = open_book(recipe)
    parent = _parent_run(book, recipe, run, prepared)
    seconds = {stage.stage: stage.seconds for stage in prepared.stages}
    status = "FAILED"
    try:
        with _timed(seconds, "train"):
            run_one("train", recipe.name, partial(_train, store, book, parent, run), recipe.run)
        model = Candidate(recipe.name, run.model_ref.key, store.local(store.receipt(run.model_ref)))
        with _timed(seconds, "register"):
            version = run_one("register", recipe.name, partial(_register, book, parent, recipe, model), recipe.run)
        with _timed(seconds, "score"):
            scores = score_model(store, recipe, model, prepared.lineage.heldout_blocks)
            record_scores(book, parent, run.run_key, recipe.name, scores)
        status = "FINISHED"
    finally:
        book.end(parent, status)
    return Course(
        recipe=recipe,
        lineage=prepared.lineage,
        run=run,
        model_folder=link_model(recipe, model.folder),
        mlflow_model=f"{version.name} version {version.version}, alias challenger",
        mlflow_uri=book.uri,
        mlflow_run=parent,
        mlflow_url=book.url(parent),
        scores=scores,
        stage_seconds=seconds,
    )


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
    status = "FAILED"
    try:
        with bar("train", run.total_steps) as advance:
            launch(run, _Follower(book, child, advance).follow)
        status = "FINISHED"
    finally:
        book.end(child, status)


class _Follower:
    """Takes the lines of metrics.jsonl to the bar at once and to MLflow now and then."""

    def __init__(self, book: Book, run_id: str, advance: Any) -> None:
        self.book, self.run_id, self.advance = book, run_id, advance
        self.last = book.last_steps(run_id)
        self.step = 0
        self.sent = 0.0

    def follow(self, lines: list[Line], final: bool = False) -> None:
        """`final`: nothing comes after this."""
        trained = [line for line in lines if "loss" in line]
        if trained:
            newest = trained[-1]
            note = f"loss {newest['loss']:.3f}  {newest['tokens_per_second']:,.0f} tokens/s"
            self.advance(newest["step"] - self.step, note)
            self.step = newest["step"]
        if final or time.monotonic() - self.sent > SEND_SECONDS:
            self.sent = time.monotonic()
            try:
                self.book.send(self.run_id, lines, self.last)
            except RetryableError as error:
                # The lines are on disk and are sent again; a training does not end because MLflow is away.
                get_run_logger().warning(error.message)


def _register(book: Book, parent: str, recipe: Recipe, model: Candidate) -> Version:
    sentence = recipe.score.sentences[0] if recipe.score.sentences else "<mask>"
    return book.register(parent, recipe.register_as.name, model.key, model.folder, sentence, _prefect_tags())


def _show(store: Store, course: Course, seconds: float) -> None:
    """The final table: printed, as an artifact in Prefect, and remembered for a second run with nothing to do."""
    sheet = sections(store, course, seconds)
    show_sheet(course.recipe.name, sheet)
    create_markdown_artifact(markdown_sheet(course.recipe.name, sheet), "result", "What was made and where it is")
    if course.mlflow_url:
        create_link_artifact(course.mlflow_url, "MLflow run", "mlflow-run")
    remember(store, course.recipe, course.run, sheet)
