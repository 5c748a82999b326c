"""Computes the scores of several models: held-out text, fill-mask, size and speed, and fine-tuned data sets.

scored = score_models(workspace, models, {model.name: workspace for model in models})
scored = deciding_scores(workspace, champion)       # only the scores that the gate compares
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from flows.pipeline.task_policy import run_one
from flows.scoring.evaluated_models import EvaluatedModel, ScoredModels, protocol_of, teacher_of
from flows.scoring.finetuned import ALL_SEEDS, NO_PROTOCOL, SeedSelection, finetuned_scores
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.eval.fill_mask import fill_mask_answers
from tasks.eval.heldout import block_counts, heldout_protocol, score_heldout
from tasks.eval.intervals import paired_difference
from tasks.eval.loaded_model import LoadedModel, load_model
from tasks.eval.scores import ScoreKey, Scores, make_scores, not_run, teacher_figures
from tasks.eval.size_and_speed import latency, parameter_counts, size_on_disk
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.tokens.blocks import open_blocks

OWN_TOKENIZER = "scored with its own tokenizer, so not comparable with models that have the recipe's tokenizer"


def score_models(
    workspace: Workspace,
    models: Sequence[EvaluatedModel],
    heldout: Mapping[str, Workspace],
    seeds: SeedSelection = ALL_SEEDS,
) -> ScoredModels:
    """Computes all scores of all models and of the recipe's teacher; each score is one task run.

    `heldout` maps the name of each model to the workspace with its held-out blocks. Scores that compare all models
    (fill-mask, size and speed) are stored with the first model.
    """
    recipe = workspace.recipe
    protocol = protocol_of(recipe)
    teacher = teacher_of(recipe)
    if teacher and teacher.key in {model.key for model in models}:
        teacher = None  # it is among the models already
    first = models[0]
    scores: dict[str, dict[str, Scores]] = {model.name: {} for model in models}
    for model in models:
        scores[model.name]["heldout"] = _heldout(heldout[model.name], model)
        if heldout[model.name].recipe is not recipe:
            scores[model.name]["heldout"]["note"] = OWN_TOKENIZER
    _add_heldout_intervals([scores[model.name]["heldout"] for model in models if heldout[model.name].recipe is recipe])
    for part, compare in _side_by_side(workspace, [*models, *([teacher] if teacher else [])]):
        scores[first.name][part] = run_one(f"score {part}", first.name, compare, recipe.run)
    if protocol is None:
        scores[first.name]["fine-tuning"] = not_run(NO_PROTOCOL)
        return ScoredModels(scores)
    if teacher:
        scores[teacher.name] = {
            "heldout": teacher_figures(scores[first.name]["heldout"])
            or not_run("no model was compared with the teacher on held-out text")
        }
    tuned = finetuned_scores(workspace, protocol, models, teacher, seeds)
    return ScoredModels({name: scores[name] | tuned.scores[name] for name in scores}, tuned.failures)


def deciding_scores(workspace: Workspace, model: EvaluatedModel) -> ScoredModels:
    """Computes the scores that the gate compares, on held-out text and fine-tuned data sets.

    The model must have the recipe's tokenizer.
    """
    protocol = protocol_of(workspace.recipe)
    scores = {"heldout": _heldout(workspace, model)}
    if protocol is None:
        return ScoredModels({model.name: scores | {"fine-tuning": not_run(NO_PROTOCOL)}})
    tuned = finetuned_scores(workspace, protocol, [model])
    return ScoredModels({model.name: scores | tuned.scores[model.name]}, tuned.failures)


def _add_heldout_intervals(figures: Sequence[Scores]) -> None:
    """Adds differences paired by held-out block: top-1 against the teacher, top-1 and KL against the first model."""
    compared = [one for one in figures if "teacher_hits" in one.get("by_block", {})]
    for number, one in enumerate(compared):
        one["against_teacher"] = paired_difference(block_counts(one, "hits"), block_counts(one, "teacher_hits"))
        if number:
            first = compared[0]
            kl = paired_difference(block_counts(one, "kl"), block_counts(first, "kl"))
            one["against_first"] = paired_difference(block_counts(one, "hits"), block_counts(first, "hits")) | {
                "kl_difference": kl["difference"]
            }


def _heldout(workspace: Workspace, model: EvaluatedModel) -> Scores:
    store, recipe, heldout = workspace.store, workspace.recipe, workspace.lineage.heldout_blocks
    rows, masks = recipe.score.heldout_rows, recipe.score.heldout_masks
    protocol = heldout_protocol(heldout, recipe.mask, rows, workspace.teacher_fingerprint, masks)

    def compute() -> Scores:
        teacher = teacher_of(recipe)
        theirs = _loaded(recipe, teacher).model if teacher else None
        own = _loaded(recipe, model).model
        blocks = [open_blocks(store, ref) for ref in heldout]
        return score_heldout(own, workspace.vocabulary, blocks, recipe.mask, rows, theirs, masks)

    work = partial(make_scores, store, ScoreKey(model.key, protocol, "heldout"), compute)
    figures: Scores = run_one("score heldout", model.name, work, recipe.run)
    return figures | {"protocol": sha256_bytes(canonical_json(protocol))}


def _side_by_side(workspace: Workspace, models: Sequence[EvaluatedModel]) -> Iterator[tuple[str, Callable[[], Scores]]]:
    """Yields name and function of each score that compares all models.

    Such a score is keyed by the first model; its protocol contains the names and keys of all models.
    """
    store, recipe = workspace.store, workspace.recipe
    names = {"models": [[model.name, model.key] for model in models]}
    sentences, runs = recipe.score.sentences, recipe.score.latency_runs
    load = partial(_load_all, recipe, models)
    filled = ScoreKey(models[0].key, names | {"sentences": list(sentences)}, "fill-mask")
    yield "fill-mask", partial(make_scores, store, filled, lambda: fill_mask_answers(load(), sentences))
    timed = ScoreKey(models[0].key, names | {"runs": runs}, "size-and-speed")
    yield "size-and-speed", partial(make_scores, store, timed, lambda: _size_and_speed(load(), runs))


def _load_all(recipe: Recipe, models: Sequence[EvaluatedModel]) -> dict[str, LoadedModel]:
    return {model.name: _loaded(recipe, model) for model in models}


def _loaded(recipe: Recipe, model: EvaluatedModel) -> LoadedModel:
    return load_model(model.folder, trust_remote_code=recipe.teacher.trust_remote_code)


def _size_and_speed(models: Mapping[str, LoadedModel], runs: int) -> Scores:
    return {
        "parameters": {name: parameter_counts(one.model) for name, one in models.items()},
        "bytes": {name: size_on_disk(one.folder) for name, one in models.items()},
        "latency": latency(models, runs=runs),
    }


def failure_sentence(scored: ScoredModels) -> str:
    """Returns one sentence about the failed scores."""
    more = f" and {len(scored.failures) - 1} more" if scored.failures[1:] else ""
    return f"scoring failed: {scored.failures[0]}{more}; repeat the command to compute only the missing scores"
