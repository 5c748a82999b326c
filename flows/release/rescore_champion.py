"""Scores the champion by the candidate's protocol, so that the gate compares scores by the same protocol.

    score_champion(registry, result)

The champion's older scores cannot be compared if a new snapshot has different held-out text or the recipe's data sets
have changed. Scores that exist in the store are not computed again.
"""

from dataclasses import replace

from flows.release.card import TrainedModel
from flows.release.version_results import record_results, result_on
from flows.scoring.compute_scores import deciding_scores, failure_sentence
from flows.scoring.evaluated_models import find_model
from flows.tracking.model_registry import ModelRegistry
from storage.errors import FatalError
from tasks.release.results import protocol_keys, results_of_sets
from tasks.tokens.vocabulary import load_vocabulary


def score_champion(registry: ModelRegistry, result: TrainedModel) -> None:
    """Scores the current champion by the candidate's protocol, and stores the results with the champion's version.

    Does nothing if the champion has these results, is the candidate itself, or has a different tokenizer. In the last
    case the two cannot be compared, so the candidate fails the gate. FatalError: a score failed.
    """
    champion = registry.champion(result.version.name)
    if champion is None or champion == result.version:
        return
    candidate = next(iter(result.scores.values()))
    protocols = protocol_keys(candidate)
    wanted = [one.set_name for one in results_of_sets(candidate) if one.was_run]
    if all(result_on(champion, name, protocols[name]) for name in wanted):
        return
    workspace = result.workspace
    model = replace(find_model(workspace.recipe, champion.uri), name="champion")
    if load_vocabulary(str(model.folder)).fingerprint != workspace.vocabulary.fingerprint:
        return
    scored = deciding_scores(workspace, model)
    if scored.failures:
        raise FatalError(failure_sentence(scored))
    own = scored.scores[model.name]
    record_results(registry, champion, [one for one in results_of_sets(own) if one.was_run], protocol_keys(own))
