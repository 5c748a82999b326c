"""Promotion in a real MLflow: decisions as tags, the alias, and two promotions at the same time."""

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.home import set_environment
from flows.promote import run_promote
from flows.release.gate import (
    ALREADY_CHAMPION,
    FORCED,
    PROMOTED,
    REFUSED,
    PromotionRequest,
    decide,
    examine,
    promotion_lock,
)
from flows.release.version_results import newest_results, record_results
from flows.tracking.mlflow_runs import open_mlflow_runs
from flows.tracking.model_registry import CHAMPION_SINCE, ModelRegistry, Version, open_registry
from storage.errors import FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tasks.recipe.config import Recipe
from tasks.release.results import NOT_RUN, SetResult
from tests.harness.recipe_values import simple_recipe

PROTOCOLS = {"heldout": sha256_bytes(b"heldout"), "ner": sha256_bytes(b"ner")}
PERSON = PromotionRequest(by="marie")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow for all tests: creating its tables takes longer than the tests."""
    folder = tmp_path_factory.mktemp("mlflow")
    set_environment(str(folder))
    return f"sqlite:///{folder}/mlflow.db"


def make(home: Path, database: str, name: str, **gate: object) -> Recipe:
    return simple_recipe(home=str(home), register={"name": name, "tracking_uri": database}, gate=gate)


@pytest.fixture
def recipe(tmp_path: Path, database: str) -> Recipe:
    """A recipe with a registered model of its own."""
    return make(tmp_path, database, f"tiny-{os.urandom(4).hex()}")


@pytest.fixture
def registry(recipe: Recipe) -> ModelRegistry:
    return open_registry(recipe)


def version_of(
    registry: ModelRegistry, recipe: Recipe, *results: SetResult, protocols: dict[str, str] = PROTOCOLS
) -> Version:
    """A new version with these results; it has no model files."""
    name = recipe.register_as.name
    run = open_mlflow_runs(recipe).start_or_resume_run("chain", sha256_bytes(os.urandom(8)), "tiny")
    if not registry.client.search_registered_models(f"name = '{name}'"):
        registry.client.create_registered_model(name)
    made = registry.client.create_model_version(name, f"runs:/{run}/model", run_id=run)
    return record_results(registry, registry.version(name, str(made.version)), results, protocols)


def heldout(*values: float) -> SetResult:
    return SetResult("heldout", "top1", values)


def ner(*values: float) -> SetResult:
    return SetResult("ner", "entity_f1", values)


CHAMPION = (heldout(0.46), ner(0.870, 0.876, 0.873))


def tag(registry: ModelRegistry, version: Version, name: str) -> str:
    return registry.version(version.name, version.version).tags[f"distil.gate.{name}"]


def champion(registry: ModelRegistry, recipe: Recipe) -> str:
    found = registry.champion(recipe.register_as.name)
    return found.version if found else ""


def test_better_equal_worse_and_incomplete(registry: ModelRegistry, recipe: Recipe) -> None:
    first = version_of(registry, recipe, *CHAMPION)
    assert decide(recipe, registry, first, PERSON).outcome == PROMOTED
    assert tag(registry, first, "against") == "no champion"
    for results, outcome, said in (
        ((heldout(0.47), ner(0.880, 0.886, 0.883)), PROMOTED, "ner rose by 0.0100, from 0.8730 to 0.8830"),
        ((heldout(0.47), ner(0.880, 0.886, 0.883)), PROMOTED, "ner is 0.8830, equal to the best so far"),
        ((heldout(0.60), ner(0.860, 0.866, 0.863)), REFUSED, "ner fell by 0.0200"),
        ((heldout(0.60), SetResult("ner", "", (), "the set is away")), REFUSED, "ner was not run: the set is away"),
    ):
        before = champion(registry, recipe)
        version = version_of(registry, recipe, *results)
        decision = decide(recipe, registry, version, PERSON)
        assert decision.outcome == tag(registry, version, "decision") == outcome
        assert said in tag(registry, version, "reason")
        assert tag(registry, version, "against") == before
        assert champion(registry, recipe) == (version.version if outcome == PROMOTED else before)
        assert [row["set_name"] for row in json.loads(tag(registry, version, "table"))][:2] == ["heldout", "ner"]
        assert tag(registry, version, "by") == "marie"


def test_a_person_may_force_for_a_reason(registry: ModelRegistry, recipe: Recipe) -> None:
    decide(recipe, registry, version_of(registry, recipe, *CHAMPION), PERSON)
    worse = version_of(registry, recipe, heldout(0.3), ner(0.5, 0.6))
    decision = decide(recipe, registry, worse, PromotionRequest("marie", force=True, reason="the old one leaks names"))
    assert decision.outcome == tag(registry, worse, "decision") == FORCED
    assert tag(registry, worse, "reason").startswith(
        "the old one leaks names (against the gate: heldout fell by 0.1600"
    )
    assert champion(registry, recipe) == worse.version
    # Former champions still count: a forced version does not lower the bar.
    assert (
        decide(recipe, registry, version_of(registry, recipe, heldout(0.31), ner(0.5, 0.6)), PERSON).outcome == REFUSED
    )


def test_a_second_decision_about_the_champion_changes_nothing(registry: ModelRegistry, recipe: Recipe) -> None:
    first = version_of(registry, recipe, *CHAMPION)
    decide(recipe, registry, first, PERSON)
    assert decide(recipe, registry, first, PERSON).outcome == ALREADY_CHAMPION
    assert tag(registry, first, "decision") == PROMOTED


def test_other_protocols_are_not_compared(registry: ModelRegistry, recipe: Recipe) -> None:
    first = version_of(registry, recipe, *CHAMPION)
    decide(recipe, registry, first, PERSON)
    other = PROTOCOLS | {"heldout": sha256_bytes(b"a newer snapshot")}
    second = version_of(registry, recipe, heldout(0.9), ner(0.88), protocols=other)
    decision = decide(recipe, registry, second, PERSON)
    assert decision.outcome == REFUSED
    assert f"heldout cannot be compared: {first}, the champion, has no score by this protocol" in decision.sentence
    # The champion is scored by the new protocol as well; its older result stays next to it.
    first = record_results(registry, registry.version(first.name, "1"), [heldout(0.85)], other)
    assert decide(recipe, registry, second, PERSON).outcome == PROMOTED
    assert [result.mean for result in newest_results(first) if result.set_name == "heldout"] == [0.85]
    third = version_of(registry, recipe, heldout(0.9), ner(0.88))
    assert f"heldout cannot be compared: {second}" in decide(recipe, registry, third, PERSON).sentence


def test_a_set_that_only_the_champion_has_counts_as_not_run(registry: ModelRegistry, recipe: Recipe) -> None:
    decide(recipe, registry, version_of(registry, recipe, *CHAMPION), PERSON)
    less = version_of(registry, recipe, heldout(0.6))
    assert "ner was not run" in decide(recipe, registry, less, PERSON).sentence
    lenient = make(Path(recipe.home), recipe.register_as.tracking_uri, recipe.register_as.name, optional=["ner"])
    assert decide(lenient, registry, less, PERSON).outcome == PROMOTED


def test_an_alias_that_was_set_by_hand_counts(registry: ModelRegistry, recipe: Recipe) -> None:
    first, second = version_of(registry, recipe, heldout(0.5)), version_of(registry, recipe, heldout(0.6))
    registry.client.set_registered_model_alias(first.name, "champion", first.version)
    assert decide(recipe, registry, second, PERSON).outcome == PROMOTED
    assert CHAMPION_SINCE in registry.version(first.name, first.version).tags
    assert [one.version for one in registry.champions(first.name)] == ["1", "2"]


def test_examine_changes_nothing(registry: ModelRegistry, recipe: Recipe) -> None:
    version = version_of(registry, recipe, heldout(0.5))
    verdict, before = examine(registry, version, recipe.gate)
    assert verdict.promote
    assert before is None
    assert champion(registry, recipe) == ""


def test_a_missing_model_or_version_is_named(registry: ModelRegistry, recipe: Recipe) -> None:
    name = recipe.register_as.name
    with pytest.raises(FatalError, match=f"MLflow has no model {name}"):
        registry.version(name)
    made = version_of(registry, recipe, heldout(0.5))
    with pytest.raises(FatalError, match="no challenger"):
        registry.version(name)
    with pytest.raises(FatalError, match=f"MLflow has no version 9 of model {name}"):
        registry.version(name, "9")
    with pytest.raises(FatalError, match=f"MLflow has no version best of model {name}"):
        registry.version(name, "best")
    assert registry.version(name, made.version) == made


def promote_at_once(
    home: str, database: str, name: str, number: str, ready: "multiprocessing.synchronize.Barrier"
) -> None:
    """Runs in each of two processes: opens the registry, waits for the other, decides."""
    recipe = make(Path(home), database, name)
    registry = open_registry(recipe)
    version = registry.version(name, number)
    ready.wait(120)
    decide(recipe, registry, version, PromotionRequest(by=number))


def test_a_waiting_version_is_compared_with_the_champion_of_its_turn(registry: ModelRegistry, recipe: Recipe) -> None:
    decide(recipe, registry, version_of(registry, recipe, heldout(0.40)), PERSON)
    high, low = version_of(registry, recipe, heldout(0.60)), version_of(registry, recipe, heldout(0.50))
    with ThreadPoolExecutor(1) as pool:
        with promotion_lock(recipe, high.name):
            waiting = pool.submit(decide, recipe, registry, low, PERSON)
            registry.set_champion(high, "2026-11-25T12:00:00", registry.champion(high.name))
        decision = waiting.result(120)
    assert (decision.outcome, decision.against) == (REFUSED, high.version)
    assert champion(registry, recipe) == high.version


def test_a_version_compared_with_an_earlier_champion_is_not_promoted(registry: ModelRegistry, recipe: Recipe) -> None:
    """Another machine, which does not share the lock, promotes in the meantime."""
    decide(recipe, registry, version_of(registry, recipe, heldout(0.40)), PERSON)
    old = registry.champion(recipe.register_as.name)
    high, low = version_of(registry, recipe, heldout(0.60)), version_of(registry, recipe, heldout(0.50))
    registry.set_champion(high, "2026-11-25T12:00:00", old)
    with pytest.raises(RetryableError, match="another process changed the champion"):
        registry.set_champion(low, "2026-11-25T12:00:01", old)
    assert champion(registry, recipe) == high.version
    assert (registry.aliases_of(high), registry.aliases_of(low)) == (["champion"], [])


@pytest.mark.slow
def test_two_promotions_at_once_are_decided_one_after_the_other(registry: ModelRegistry, recipe: Recipe) -> None:
    """Both beat the champion; the lower of them, where it comes second, does not beat the higher."""
    decide(recipe, registry, version_of(registry, recipe, heldout(0.40)), PERSON)
    high, low = version_of(registry, recipe, heldout(0.60)), version_of(registry, recipe, heldout(0.50))
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    processes = [
        context.Process(
            target=promote_at_once,
            args=(recipe.home, recipe.register_as.tracking_uri, version.name, version.version, ready),
        )
        for version in (high, low)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    decisions = {version.version: tag(registry, version, "decision") for version in (high, low)}
    against = {version.version: tag(registry, version, "against") for version in (high, low)}
    assert champion(registry, recipe) == high.version
    assert decisions[high.version] == PROMOTED
    if against[low.version] == high.version:
        assert decisions[low.version] == REFUSED
        assert against[high.version] == "1"
    else:  # the lower one was promoted first and replaced afterwards
        assert decisions[low.version] == PROMOTED
        assert (against[low.version], against[high.version]) == ("1", low.version)


def test_a_set_that_was_not_run_does_not_block_once_it_is_removed(registry: ModelRegistry, recipe: Recipe) -> None:
    lacking = SetResult("fine-tuning", "", (), "no protocol is named")
    version = version_of(registry, recipe, heldout(0.5), lacking, protocols=PROTOCOLS | {"fine-tuning": NOT_RUN})
    assert decide(recipe, registry, version, PERSON).outcome == REFUSED
    record_results(registry, registry.version(version.name, version.version), [heldout(0.5), ner(0.8, 0.9)], PROTOCOLS)
    assert decide(recipe, registry, version, PERSON).outcome == PROMOTED


def test_only_its_own_recipe_decides_about_a_model(recipe: Recipe) -> None:
    with pytest.raises(FatalError, match=f"registers {recipe.register_as.name}, so its gate does not apply to other"):
        run_promote(recipe, model="other", version="1")
