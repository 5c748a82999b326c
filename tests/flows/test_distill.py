"""The flow `distill`: promotion and scoring of the model that it registered, and repeated trainings.

tests/end_to_end/test_chain.py checks the run itself.
"""

import json
import logging
from pathlib import Path

import pytest

from storage.artifact import Ref
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.lineage import Workspace, training_key, training_key_schema_1
from tasks.recipe.run_json import model_ref
from tasks.tokens.blocks import make_blocks
from tests.harness.recipe_values import teacherless_recipe
from tests.harness.tiny import save_tokenizer, write_oscar


@pytest.fixture(scope="module")
def first(distil):
    return distil("run", "tiny.toml")


@pytest.mark.guard
@pytest.mark.slow
def test_a_person_forces_what_the_gate_refused(first, distil, place: Path) -> None:
    refused = distil("promote", "tiny.toml", "--model", "distilled", "--version", "1")
    assert refused.returncode == 1
    assert "distil: distilled version 1: refused: fine-tuning was not run" in refused.stderr
    assert distil("promote", "tiny.toml", "--force").returncode == 1
    forced = distil("promote", "tiny.toml", "--force", "--reason", "no set here")
    assert forced.returncode == 0, forced.stderr
    assert "distilled version 1: forced: no set here (against the gate: fine-tuning was not run" in forced.stdout


@pytest.mark.slow
def test_the_champion_is_scored_by_the_protocol_of_the_candidate(first, distil, place: Path) -> None:
    """Version 1 is champion; version 2 is scored on fewer held-out blocks."""
    from mlflow.tracking import MlflowClient

    assert distil("promote", "tiny.toml", "--force", "--reason", "no set here").returncode == 0
    second = distil("run", "tiny.toml", "train.seed=1", "score.heldout_rows=8", 'gate.optional=["fine-tuning"]')
    assert second.returncode == 0, second.stderr
    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    tags = client.get_model_version("distilled", "2").tags
    (row, *_) = json.loads(tags["distil.gate.table"])
    assert (row["set_name"], tags["distil.gate.against"]) == ("heldout", "1")
    assert row["best"] is not None
    protocol = tags["distil.protocol.heldout"]
    champion = client.get_model_version("distilled", "1").tags
    assert len([name for name in champion if name.startswith("distil.standing.heldout.")]) == 2
    assert json.loads(champion[f"distil.standing.heldout.{protocol}"])["values"] == [row["best"]]


@pytest.mark.slow
def test_results_of_a_registered_model_are_stored_with_it_without_scoring_it_twice(first, distil, place: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    tags = client.get_model_version("distilled", "1").tags
    results = [tag for tag in tags if tag.startswith("distil.standing.heldout.")]
    receipts = place / ".distil" / "store" / "receipts" / "scores"
    before = len(list(receipts.iterdir()))
    for result in results:
        client.delete_model_version_tag("distilled", "1", result)
    done = distil("score", "models:/distilled/1", "tiny.toml")
    assert done.returncode == 0, done.stderr
    assert "distilled-1 scored" in done.stdout
    after = client.get_model_version("distilled", "1").tags
    result = f"distil.standing.heldout.{after['distil.protocol.heldout']}"
    assert after[result] == tags[result]
    # Only the two scores keyed by the names of all models are new: the chain has scored held-out text already.
    assert len(list(receipts.iterdir())) == before + 2


# ---- trainings of older versions ---------------------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path: Path) -> Workspace:
    """A store with everything that a recipe needs for its training."""
    corpus = {"url": str(write_oscar(tmp_path / "corpus", parts=1, texts=8)), "heldout_per_mille": 0}
    recipe = teacherless_recipe(save_tokenizer(tmp_path / "tokenizer"), corpus=corpus)
    workspace = Workspace(Store(tmp_path / "store"), recipe)
    for source, _ in workspace.lineage.sources:
        shard_source(workspace.store, source, recipe.corpus)
    workspace = workspace.refreshed()
    for shard in workspace.lineage.shards:
        make_blocks(workspace.store, shard, recipe.blocks, workspace.vocabulary)
    return workspace


def commit_model(store: Store, ref: Ref) -> None:
    """Commits a model without real weights."""
    with store.scratch() as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        store.commit(ref, folder, schema=1, rows=1, tokens=1, settings={}, parents=[])


def explanation(workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Text on standard error right before the training."""
    from flows import distill
    from flows.inventory import planned_training

    monkeypatch.setattr(distill, "get_run_logger", lambda: logging.getLogger("test"))
    distill._explain_repeated_training(workspace, planned_training(workspace))
    return capsys.readouterr().err


def test_a_training_that_an_older_version_finished_is_repeated_with_an_explanation(
    untrained: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.distill import TRAINED_AGAIN

    name = untrained.recipe.name
    assert explanation(untrained, capsys, monkeypatch) == ""
    commit_model(untrained.store, model_ref(training_key_schema_1(untrained), name))
    assert explanation(untrained, capsys, monkeypatch) == f"{TRAINED_AGAIN}\n"
    for changes in ({"train.seed": 7}, {"train.result": "best"}):
        assert explanation(untrained.with_changes(changes), capsys, monkeypatch) == ""
    commit_model(untrained.store, model_ref(training_key(untrained), name))
    assert explanation(untrained, capsys, monkeypatch) == ""
