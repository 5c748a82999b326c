"""Scores of models side by side: held-out text, fill-mask, size and speed, fine-tuned sets. One flow and its parts.

    score(recipe, model, others)     flow: scores any folders, hub ids or registered models by the recipe's protocol
    score_models(store, recipe, …)   the same inside `distill`, after training
    deciding_scores(store, …)        only what the gate looks at, of a champion

Scores are artifacts by (model, protocol, set, seed): what is there is not computed again. What cannot be run says so.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed

from flows.bind import bound_flow, run_one
from flows.comparison import comparison_table, fill_mask_table, notes
from flows.corpus import failed_state, prepare_heldout
from flows.home import REGISTERED, open_store
from flows.promote import record_standings
from flows.recorded import record_scores
from flows.registry import fetch_model, open_registry
from flows.report import TextTable, markdown_tables, show_table
from flows.shown import only_a_view, publish_failures
from flows.track import open_book
from flows.tuned import EVERY_PAIR, NO_PROTOCOL, Candidate, Judged, Pairs, tuned_scores
from storage.artifact import Ref
from storage.error import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.block import open_blocks
from tasks.compare import Contender, fill_mask_sheet, latency, load_contender, parameters, size_on_disk
from tasks.config import Recipe
from tasks.interval import against
from tasks.lineage import teacher_key, vocabulary_of
from tasks.measured import measured_models
from tasks.model_files import resolve_model, scored_as
from tasks.picture import picture
from tasks.protocol import Protocol, load_protocol
from tasks.recipe import placed
from tasks.score import Scores, Trial, block_counts, heldout_protocol, make_scores, not_run, score_heldout
from tasks.standing import protocols, standings, teachers_own
from tasks.vocabulary import load_vocabulary

TEACHER, CONTROL = "teacher", "control"
PICTURE = "scores.png"
OWN_TOKENIZER = "by its own tokenizer: other pieces, so not comparable with models that share the recipe's"


def protocol_of(recipe: Recipe) -> Protocol | None:
    """The protocol of the fine-tuned sets, or None where the recipe names none. FatalError if it cannot be used."""
    return load_protocol(recipe.score.protocol) if recipe.score.protocol else None


def teacher_of(recipe: Recipe) -> Candidate | None:
    """The recipe's teacher as a model to compare with, or None when there is none."""
    if not recipe.teacher.model:
        return None
    folder = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    return Candidate(TEACHER, scored_as(folder, trust_remote_code=recipe.teacher.trust_remote_code), folder)


def control_of(recipe: Recipe) -> Candidate | None:
    """The recipe's control as a model to compare with, or None. FatalError: it reads other tokens."""
    if not recipe.score.control:
        return None
    control = find_model(recipe, recipe.score.control)
    if _same_tokenizer(recipe, control.folder) is not recipe:
        raise FatalError(
            f"score.control: {recipe.score.control} has another tokenizer than the student, so their scores on "
            "held-out text cannot be compared; give a model with the same one"
        )
    return replace(control, name=CONTROL)


def score_models(
    store: Store,
    recipe: Recipe,
    models: Sequence[Candidate],
    heldout: Mapping[str, tuple[Recipe, Sequence[Ref]]],
    pairs: Pairs = EVERY_PAIR,
) -> Judged:
    """All scores of all models, each a task run of its own, beside those of the recipe's teacher.

    `heldout`: by model the recipe that its held-out blocks were made with, and those blocks. What compares models side
    by side (fill-mask, size and speed) stands among the scores of the first.
    """
    protocol = protocol_of(recipe)
    teacher = teacher_of(recipe)
    if teacher and teacher.key in {model.key for model in models}:
        teacher = None  # it is one of them already
    first = models[0]
    scores: dict[str, dict[str, Scores]] = {model.name: {} for model in models}
    for model in models:
        own, blocks = heldout[model.name]
        scores[model.name]["heldout"] = _heldout(store, own, model, blocks)
        if own is not recipe:
            scores[model.name]["heldout"]["note"] = OWN_TOKENIZER
    _add_heldout_intervals([scores[model.name]["heldout"] for model in models if heldout[model.name][0] is recipe])
    for part, compare in _side_by_side(store, recipe, [*models, *([teacher] if teacher else [])]):
        scores[first.name][part] = run_one(f"score {part}", first.name, compare, recipe.run)
    if protocol is None:
        scores[first.name]["fine-tuning"] = not_run(NO_PROTOCOL)
        return Judged(scores)
    if teacher:
        scores[teacher.name] = {
            "heldout": teachers_own(scores[first.name]["heldout"])
            or not_run("no model was compared with the teacher on held-out text")
        }
    tuned = tuned_scores(store, recipe, protocol, models, teacher, pairs)
    return Judged({name: scores[name] | tuned.scores[name] for name in scores}, tuned.failures)


def deciding_scores(store: Store, recipe: Recipe, model: Candidate, heldout: Sequence[Ref]) -> Judged:
    """What the gate compares of a model that reads the recipe's tokens: held-out text and the fine-tuned sets."""
    protocol = protocol_of(recipe)
    scores = {"heldout": _heldout(store, recipe, model, heldout)}
    if protocol is None:
        return Judged({model.name: scores | {"fine-tuning": not_run(NO_PROTOCOL)}})
    tuned = tuned_scores(store, recipe, protocol, [model])
    return Judged({model.name: scores | tuned.scores[model.name]}, tuned.failures)


def _add_heldout_intervals(figures: Sequence[Scores]) -> None:
    """Top-1 of each model against the teacher's, and against the first model's (KL too), paired by held-out block."""
    compared = [one for one in figures if "teacher_hits" in one.get("by_block", {})]
    for number, one in enumerate(compared):
        one["against_teacher"] = against(block_counts(one, "hits"), block_counts(one, "teacher_hits"))
        if number:
            first = compared[0]
            kl = against(block_counts(one, "kl"), block_counts(first, "kl"))
            one["against_first"] = against(block_counts(one, "hits"), block_counts(first, "hits")) | {
                "kl_difference": kl["difference"]
            }


def _heldout(store: Store, recipe: Recipe, model: Candidate, heldout: Sequence[Ref]) -> Scores:
    rows, masks = recipe.score.heldout_rows, recipe.score.heldout_masks
    protocol = heldout_protocol(heldout, recipe.mask, rows, teacher_key(recipe), masks)

    def compute() -> Scores:
        teacher = teacher_of(recipe)
        theirs = _loaded(recipe, teacher).model if teacher else None
        own = _loaded(recipe, model).model
        blocks = [open_blocks(store, ref) for ref in heldout]
        return score_heldout(own, vocabulary_of(recipe), blocks, recipe.mask, rows, theirs, masks)

    work = partial(make_scores, store, Trial(model.key, protocol, "heldout"), compute)
    figures: Scores = run_one("score heldout", model.name, work, recipe.run)
    return figures | {"protocol": sha256_bytes(canonical_json(protocol))}


def _side_by_side(
    store: Store, recipe: Recipe, models: Sequence[Candidate]
) -> Iterator[tuple[str, Callable[[], Scores]]]:
    """What needs all models at once; kept under the first, with the names and keys of all in the protocol."""
    names = {"models": [[model.name, model.key] for model in models]}
    sentences, runs = recipe.score.sentences, recipe.score.latency_runs
    load = partial(_contenders, recipe, models)
    asked = Trial(models[0].key, names | {"sentences": list(sentences)}, "fill-mask")
    yield "fill-mask", partial(make_scores, store, asked, lambda: fill_mask_sheet(load(), sentences))
    timed = Trial(models[0].key, names | {"runs": runs}, "size-and-speed")
    yield "size-and-speed", partial(make_scores, store, timed, lambda: _size_and_speed(load(), runs))


def _contenders(recipe: Recipe, models: Sequence[Candidate]) -> dict[str, Contender]:
    return {model.name: _loaded(recipe, model) for model in models}


def _loaded(recipe: Recipe, model: Candidate) -> Contender:
    return load_contender(model.folder, trust_remote_code=recipe.teacher.trust_remote_code)


def _size_and_speed(models: Mapping[str, Contender], runs: int) -> Scores:
    return {
        "parameters": {name: parameters(one.model) for name, one in models.items()},
        "bytes": {name: size_on_disk(one.folder) for name, one in models.items()},
        "latency": latency(models, runs=runs),
    }


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
    recipe = placed(recipe)
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
    judged = score_models(store, recipe, models, heldout, Pairs(only, force))
    title = ", ".join(candidate.name for candidate in models)
    _show(title, judged)
    record(recipe, models, judged)
    if judged.failures:
        return Failed(message=failure_sentence(judged))
    return Completed(message=f"{title} scored")


score = bound_flow(run_score, "score", run_name="{model}")


def failure_sentence(judged: Judged) -> str:
    """One sentence about the scores that failed."""
    more = f" and {len(judged.failures) - 1} more" if judged.failures[1:] else ""
    return f"scoring failed: {judged.failures[0]}{more}; the same command computes only what is missing"


def _candidates(recipe: Recipe, models: Sequence[str]) -> list[Candidate]:
    """Every model once, with a short name of its own; the recipe's teacher only where nothing else is scored."""
    found: dict[str, Candidate] = {}
    for model in models:
        one = find_model(recipe, model)
        found.setdefault(one.key, replace(one, name=_short_name(model, {other.name for other in found.values()})))
    teacher = teacher_of(recipe)
    students = [one for key, one in found.items() if not teacher or key != teacher.key]
    return students or [replace(one, name=TEACHER) for one in found.values()]


def find_model(recipe: Recipe, model: str) -> Candidate:
    """A folder, hub id or registered model, under its own name and keyed by its content. FatalError: there is none."""
    uri = open_registry(recipe).named(model).uri if model.startswith(REGISTERED) else ""
    folder = fetch_model(recipe, uri) if uri else resolve_model(model)
    return Candidate(model, scored_as(folder, trust_remote_code=recipe.teacher.trust_remote_code), folder, uri)


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


def _same_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe itself, or, for a model with another tokenizer, one with that tokenizer and no teacher to compare."""
    if load_vocabulary(str(folder)).fingerprint == vocabulary_of(recipe).fingerprint:
        return recipe
    blocks = recipe.blocks.model_copy(update={"tokenizer": str(folder)})
    return recipe.model_copy(update={"blocks": blocks, "teacher": recipe.teacher.model_copy(update={"model": ""})})


def _show(title: str, judged: Judged) -> None:
    """The table of all models and the fill-mask sheet, printed and as an artifact."""
    sheet = fill_mask_table(judged.scores)
    tables: dict[str, TextTable] = {title: comparison_table(judged.scores)}
    tables |= {"Fill-mask": sheet} if sheet else {}
    tables |= {"Notes": (["about", "note"], notes(judged.scores))}
    for heading, table in tables.items():
        show_table(heading, table)
    with only_a_view():
        create_markdown_artifact(markdown_tables(tables), "scores", f"Scores of {title}")


def record(recipe: Recipe, models: Sequence[Candidate], judged: Judged) -> None:
    """One MLflow run for the comparison, with its picture and a child run for each model and set.

    A registered model of this recipe keeps its standings too, so that the gate can compare it with others.
    """
    book = open_book(recipe)
    protocol = protocol_of(recipe)
    settings = protocol.model_dump(mode="json") if protocol else {}
    key = sha256_bytes(canonical_json([[model.key for model in models], teacher_key(recipe), settings]))
    names = ", ".join(model.name for model in models)
    parent = book.run("scores", key, f"scores {names}", settings={"models": names, "protocol": settings})
    with book.ending(parent):
        record_scores(book, parent, key, judged)
        book.keep(parent, {PICTURE: picture(names, measured_models(judged.scores))})
    for model in models:
        if is_own(recipe, model.uri):
            own = judged.scores[model.name]
            record_standings(book.registry, book.registry.named(model.uri), standings(own), protocols(own))


def is_own(recipe: Recipe, uri: str) -> bool:
    """Whether a registered model is one of this recipe. Standings by the held-out text of another recipe would say
    nothing of it, and take the place of its own."""
    name = re.split("[@/]", uri.removeprefix(REGISTERED), maxsplit=1)[0]
    return uri.startswith(REGISTERED) and name == recipe.register_as.name
