"""Promotion and scoring of the model that `distil run` registered; end_to_end/test_chain.py checks the run itself."""

import json
from pathlib import Path

import pytest


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
def test_a_candidate_by_another_protocol_has_the_champion_scored_by_it_too(first, distil, place: Path) -> None:
    """The champion is version 1; the next one is scored on fewer held-out blocks."""
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
def test_a_registered_model_that_is_scored_keeps_its_standings_and_costs_no_score_twice(
    first, distil, place: Path
) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    tags = client.get_model_version("distilled", "1").tags
    standings = [tag for tag in tags if tag.startswith("distil.standing.heldout.")]
    receipts = place / ".distil" / "store" / "receipts" / "scores"
    before = len(list(receipts.iterdir()))
    for standing in standings:
        client.delete_model_version_tag("distilled", "1", standing)
    done = distil("score", "models:/distilled/1", "tiny.toml")
    assert done.returncode == 0, done.stderr
    assert "distilled-1 scored" in done.stdout
    after = client.get_model_version("distilled", "1").tags
    standing = f"distil.standing.heldout.{after['distil.protocol.heldout']}"
    assert after[standing] == tags[standing]
    # Only the sheets that name the models beside the teacher: held-out text was scored in the chain.
    assert len(list(receipts.iterdir())) == before + 2
