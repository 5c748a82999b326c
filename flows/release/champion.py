"""Has the champion scored by the candidate's protocol, so that the gate compares figures of one kind.

    score_champion(registry, result)

A new snapshot brings other held-out text, and a recipe may change what is scored: then the champion's older figures say
nothing. What was scored before is read from the store, not computed again.
"""

from dataclasses import replace

from flows.release.card import TrainedModel
from flows.release.version_results import record_results, result_on
from flows.scoring.compute import deciding_scores, failure_sentence
from flows.scoring.evaluated_models import find_model
from flows.tracking.registry import ModelRegistry
from storage.errors import FatalError
from tasks.release.results import protocol_keys, set_results
from tasks.tokens.vocabulary import load_vocabulary


def score_champion(registry: ModelRegistry, result: TrainedModel) -> None:
    """Scores the present champion and keeps its results, unless it has them, is the candidate or reads other tokens.

    Without them the gate refuses the candidate and says that the two cannot be compared. FatalError if a score failed.
    """
    champion = registry.champion(result.version.name)
    if champion is None or champion == result.version:
        return
    candidate = next(iter(result.scores.values()))
    protocols = protocol_keys(candidate)
    wanted = [one.set_name for one in set_results(candidate) if one.was_run]
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
    record_results(registry, champion, [one for one in set_results(own) if one.was_run], protocol_keys(own))
