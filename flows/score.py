"""Scores of a model: on held-out text, on a fill-mask sheet, latency and size, named entities. One flow and its parts.

    score(recipe, model)             flow: scores any folder, hub id or registered model by the recipe's protocol
    score_model(store, recipe, …)    the same inside `distill`, after training

Scores are artifacts by (model, protocol, set, seed): what is there is not computed again. What cannot be run says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.bind import bound_flow, run_one
from flows.corpus import failed_state, prepare_heldout, publish_failures
from flows.home import open_store, settled
from flows.report import markdown_sheet, show_sheet
from flows.sheet import fill_mask_rows, score_rows
from flows.track import REGISTERED, Book, fetch_model, open_book
from storage.artifact import Ref
from storage.store import Store
from tasks.block import open_blocks
from tasks.compare import fill_mask_sheet, latency, load_contender, parameters, size_on_disk
from tasks.config import Recipe, Teacher
from tasks.lineage import teacher_key, vocabulary_of
from tasks.ner import score_ner
from tasks.score import Scores, Trial, heldout_protocol, make_scores, score_heldout, was_run
from tasks.teacher import fingerprint_of, resolve_model
from tasks.vocabulary import load_vocabulary


@dataclass(frozen=True)
class Candidate:
    """A model to judge: its name for people, the key that its scores are kept under, its folder."""

    name: str
    key: str
    folder: Path


def score_model(store: Store, recipe: Recipe, candidate: Candidate, heldout: Sequence[Ref]) -> dict[str, Scores]:
    """All scores of one model, each a task run of its own: set -> figures, or `not run` with its reason."""
    return {
        part: run_one(f"score {part}", candidate.name, work, recipe.run)
        for part, work in _parts(store, recipe, candidate, heldout)
    }


def _parts(
    store: Store, recipe: Recipe, candidate: Candidate, heldout: Sequence[Ref]
) -> Iterator[tuple[str, Callable[[], Scores]]]:
    yield "heldout", partial(_heldout, store, recipe, candidate, heldout)
    yield "fill-mask", partial(_fill_mask, store, recipe, candidate)
    yield "size-and-speed", partial(_size_and_speed, store, recipe, candidate)
    yield "ner", partial(_ner, store, recipe, candidate)


def teacher_of(recipe: Recipe) -> Candidate | None:
    """The recipe's teacher as a model to compare with, or None when there is none."""
    if not recipe.teacher.model:
        return None
    folder = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    return Candidate("teacher", teacher_key(recipe), folder)


def _contenders(recipe: Recipe, candidate: Candidate) -> dict[str, Any]:
    """The model and, where there is one, its teacher, loaded."""
    teacher = teacher_of(recipe)
    pair = [("student", candidate)] + ([("teacher", teacher)] if teacher else [])
    trust = recipe.teacher.trust_remote_code
    return {name: load_contender(one.folder, trust_remote_code=trust) for name, one in pair}


def _heldout(store: Store, recipe: Recipe, candidate: Candidate, heldout: Sequence[Ref]) -> Scores:
    blocks = [open_blocks(store, ref) for ref in heldout]
    rows = recipe.score.heldout_rows
    protocol = heldout_protocol(blocks, recipe.mask, rows, teacher_key(recipe))

    def compute() -> Scores:
        models = _contenders(recipe, candidate)
        teacher = models["teacher"].model if "teacher" in models else None
        return score_heldout(models["student"].model, vocabulary_of(recipe), blocks, recipe.mask, rows, teacher)

    return make_scores(store, Trial(candidate.key, protocol, "heldout"), compute)


def _fill_mask(store: Store, recipe: Recipe, candidate: Candidate) -> Scores:
    protocol = {"sentences": list(recipe.score.sentences), "teacher": teacher_key(recipe)}
    trial = Trial(candidate.key, protocol, "fill-mask")
    return make_scores(store, trial, lambda: fill_mask_sheet(_contenders(recipe, candidate), recipe.score.sentences))


def _size_and_speed(store: Store, recipe: Recipe, candidate: Candidate) -> Scores:
    def compute() -> Scores:
        models = _contenders(recipe, candidate)
        return {
            "parameters": {name: parameters(one.model) for name, one in models.items()},
            "bytes": {name: size_on_disk(one.folder) for name, one in models.items()},
            "latency": latency(models, runs=recipe.score.latency_runs),
        }

    protocol = {"runs": recipe.score.latency_runs, "teacher": teacher_key(recipe)}
    return make_scores(store, Trial(candidate.key, protocol, "size-and-speed"), compute)


def _ner(store: Store, recipe: Recipe, candidate: Candidate) -> Scores:
    return score_ner(store, candidate.key, candidate.folder, recipe.score, recipe.train.device)


# ---- the flow ----------------------------------------------------------------------------------------------


def run_score(recipe: Recipe, model: str) -> State[Any]:
    """Scores a masked language model by a recipe's protocol, on the recipe's held-out text.

    Args:
        recipe: Whose text and score settings are taken; its teacher is compared with.
        model: A folder, a hub id, or a registered model such as models:/distilled@challenger.
    """
    recipe = settled(recipe)
    store = open_store(recipe)
    folder = fetch_model(recipe, model) if model.startswith(REGISTERED) else resolve_model(model)
    candidate = Candidate(model, fingerprint_of(Teacher(model=str(folder))), folder)
    recipe = _same_tokenizer(recipe, folder)
    prepared = prepare_heldout(store, recipe)
    publish_failures(prepared.failures)
    if prepared.too_many_failed(recipe):
        return failed_state(prepared.failures)
    scores = score_model(store, recipe, candidate, prepared.lineage.heldout_blocks)
    sheet = {"Scores": score_rows(scores), "Fill-mask": fill_mask_rows(scores["fill-mask"])}
    show_sheet(model, sheet)
    create_markdown_artifact(markdown_sheet(model, sheet), "scores", f"Scores of {model}")
    _record(recipe, candidate, scores)
    return Completed(message=f"{model} scored")


score = bound_flow(run_score, "score", run_name="{model}")


def _same_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe itself, or, for a model with another tokenizer, one with that tokenizer and no teacher to compare."""
    if load_vocabulary(str(folder)).fingerprint == vocabulary_of(recipe).fingerprint:
        return recipe
    blocks = recipe.blocks.model_copy(update={"tokenizer": str(folder)})
    return recipe.model_copy(update={"blocks": blocks, "teacher": recipe.teacher.model_copy(update={"model": ""})})


def _record(recipe: Recipe, candidate: Candidate, scores: dict[str, Scores]) -> None:
    """One MLflow run for the model with a child run for each set."""
    book = open_book(recipe)
    parent = book.run("scores", candidate.key, f"scores {candidate.name}", settings={"model": candidate.name})
    record_scores(book, parent, candidate.key, candidate.name, scores)
    book.end(parent)


def record_scores(book: Book, parent: str, key: str, name: str, scores: dict[str, Scores]) -> None:
    """Each set of scores as a child run with the figures as they are in a file; why a set was not run, as a tag."""
    for part, figures in scores.items():
        if not was_run(figures):
            book.tag(parent, {f"distil.score.{part}": f"not run: {figures['reason']}"})
            continue
        child = book.run(f"score-{part}", key, f"{name} score {part}", parent=parent)
        book.figures(child, figures)
        book.file(child, f"{part}.json", figures)
        book.end(child)
