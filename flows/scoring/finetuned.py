"""Scores the fine-tuned data sets of a protocol, with one task run per data set, seed and model.

    scored = finetuned_scores(workspace, protocol, models, teacher)

Scores that exist in the store are not computed again, so a killed run resumes with the missing ones. A data set that
cannot be loaded is reported as `not run`, with the reason. If a seed fails, its data set is `not run` and the seed is
listed in `failures`; all other scores are still computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from prefect import get_run_logger

from flows.pipeline.task_policy import run_one
from flows.scoring.evaluated_models import EvaluatedModel, ScoredModels
from storage.errors import DistilError
from storage.store import Store
from tasks.eval.datasets.load import AnySet, load_set
from tasks.eval.finetuned_scores import compare_models, missing_seeds, score_seed, scores_of_set
from tasks.eval.protocol import Protocol
from tasks.eval.scores import Scores, not_run, was_run
from tasks.lineage import Workspace

NO_PROTOCOL = "score.protocol is not set"


@dataclass(frozen=True)
class SeedSelection:
    """Selects the (data set, seed) pairs to compute: all, those of one data set, or one pair.

    `only` is "", "xnli" or "xnli seed 1". Selected pairs that have scores are computed again only with `force`.
    """

    only: str = ""
    force: bool = False

    def takes(self, name: str, seed: int) -> bool:
        """Returns True if the pair is selected."""
        return self.only in ("", name, f"{name} seed {seed}")


ALL_SEEDS = SeedSelection()


def finetuned_scores(
    workspace: Workspace,
    protocol: Protocol,
    models: Sequence[EvaluatedModel],
    teacher: EvaluatedModel | None = None,
    seeds: SeedSelection = ALL_SEEDS,
) -> ScoredModels:
    """Scores all models and the teacher on all data sets of the protocol.

    Each model is also compared with the teacher (`against_teacher`), and all but the first with the first model
    (`against_first`).
    """
    store, recipe = workspace.store, workspace.recipe
    everyone = [*models, *([teacher] if teacher else [])]
    scores: dict[str, dict[str, Scores]] = {model.name: {} for model in everyone}
    failures: list[str] = []
    for name in protocol.sets:
        try:
            data = run_one("load", name, partial(load_set, name, protocol.sets[name], recipe.score.sets), recipe.run)
        except DistilError as error:
            for model in everyone:
                scores[model.name][name] = not_run(error.message)
            continue
        for model in everyone:
            failures += _tune(workspace, protocol, data, model, seeds)
            scores[model.name][name] = _figures(store, protocol, data, model)
        if teacher:
            _compare(store, protocol, data, models, teacher, scores, "against_teacher")
        _compare(store, protocol, data, models[1:], models[0], scores, "against_first")
    return ScoredModels(scores, tuple(failures))


def _tune(
    workspace: Workspace, protocol: Protocol, data: AnySet, model: EvaluatedModel, seeds: SeedSelection
) -> list[str]:
    """Computes the missing or forced seeds of one data set and model; returns one sentence per failed seed."""
    store, recipe = workspace.store, workspace.recipe
    failures: list[str] = []
    missing = missing_seeds(store, model.key, data, protocol)
    for seed in protocol.seeds:
        if not seeds.takes(data.name, seed) or not (seeds.force or seed in missing):
            continue
        device = recipe.train.device
        work = partial(
            score_seed, store, model.key, model.folder, data, protocol, seed, device=device, force=seeds.force
        )
        try:
            run_one("score", f"{data.name} seed {seed} {model.name}", work, recipe.run)
        except DistilError as error:
            get_run_logger().error(error.message)
            failures.append(f"{data.name} seed {seed} of {model.name}: {error.message}")
            if seed == protocol.seeds[0]:
                break  # the first seed chooses the learning rate of the others
    return failures


def _figures(store: Store, protocol: Protocol, data: AnySet, model: EvaluatedModel) -> Scores:
    missing = missing_seeds(store, model.key, data, protocol)
    if missing:
        listed = ", ".join(map(str, missing))
        return not_run(f"the scores of seed {listed} are missing; repeat the command to compute them")
    return scores_of_set(store, model.key, data, protocol)


def _compare(
    store: Store,
    protocol: Protocol,
    data: AnySet,
    models: Sequence[EvaluatedModel],
    other: EvaluatedModel,
    scores: dict[str, dict[str, Scores]],
    part: str,
) -> None:
    """Adds ratio and difference to `other` as `part` to the scores of each model, if both models were run."""
    if was_run(scores[other.name][data.name]):
        for model in models:
            if was_run(scores[model.name][data.name]):
                scores[model.name][data.name][part] = compare_models(store, model.key, other.key, data, protocol)
