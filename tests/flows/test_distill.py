"""The whole chain as users run it: once, again, damaged and repaired. Real files, real server, a model of no use."""

import json
import os
from pathlib import Path

import pytest

CHAIN = ("source", "shard", "blocks", "calibration", "targets", "model")


@pytest.fixture(scope="module")
def first(distil):
    return distil("run", "tiny.toml")


def files(place: Path) -> dict[str, int]:
    """Every file of the store and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in (place / ".distil" / "store").rglob("*") if path.is_file()}


def receipts(place: Path, kind: str) -> dict[str, int]:
    folder = place / ".distil" / "store" / "receipts" / kind
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.receipt.json")}


def test_it_ends_with_a_table_of_what_was_made(first, place: Path) -> None:
    assert first.returncode == 0, first.stderr
    for word in ("masked top-1", "not run: score.protocol names no", "student:", "distil up --home", "version 1"):
        assert word in first.stdout
    assert "Traceback" not in first.stderr


def test_the_model_loads_from_its_folder(first, place: Path) -> None:
    from transformers import AutoModel, AutoTokenizer, pipeline

    folder = place / ".distil" / "models" / "tiny"
    assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 2
    assert len(pipeline("fill-mask", model=str(folder))("Le juge <mask> le dossier.")) == 5
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<mask>"


def test_a_second_run_does_nothing_and_says_so(first, distil, place: Path) -> None:
    before = files(place)
    again = distil("run", "tiny.toml")
    assert again.returncode == 0
    assert "nothing to do: 3 shards" in again.stdout
    assert files(place) == before


def test_status_counts_every_stage(first, distil) -> None:
    rows = json.loads(distil("status", "tiny.toml", "--json").stdout)
    for stage in CHAIN:
        assert rows[stage]["done"] == rows[stage]["wanted"] > 0, stage
        assert not rows[stage]["missing"], stage
    assert rows["targets"]["bytes"] > 0


def test_mlflow_holds_settings_curve_and_data_sets(first, place: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("distil")
    runs = {run.data.tags["distil.part"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["chain"].data.params["train.max_steps"] == "40"
    assert {one.dataset.name for one in runs["chain"].inputs.dataset_inputs} == {"snapshot", "manifest"}
    steps = [metric.step for metric in client.get_metric_history(runs["train"].info.run_id, "loss")]
    assert steps == list(range(5, 41, 5))
    assert runs["score-heldout"].data.metrics["teacher_perplexity"] > 1


def test_the_gate_refuses_what_was_not_scored_and_says_so(first, place: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    tags = client.get_model_version("distilled", "1").tags
    assert tags["distil.gate.decision"] == "refused"
    assert tags["distil.gate.reason"].startswith("fine-tuning was not run: score.protocol names no")
    assert "champion" not in client.get_registered_model("distilled").aliases
    assert "fine-tuning was not run: score.protocol names no" in " ".join(first.stdout.split())


def test_card_and_picture_lie_beside_the_model_and_in_mlflow(first, place: Path) -> None:
    import mlflow
    from huggingface_hub import ModelCard

    folder = place / ".distil" / "models" / "tiny-card"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.metrics == ["accuracy"]
    assert "2 layers, distilled from `teacher`" in card.text
    assert "- fine-tuning (student): score.protocol names no" in card.text
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    mlflow.set_tracking_uri(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    model = Path(mlflow.artifacts.download_artifacts("models:/distilled@challenger")) / "model"
    assert {"README.md", "scores.png", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}


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
    """The champion is version 1; the next one is judged on fewer held-out blocks."""
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
def test_damage_is_named_and_exactly_that_is_made_again(first, distil, place: Path) -> None:
    before = {kind: receipts(place, kind) for kind in ("source", "shard", "blocks", "targets")}
    whole, deleted, flipped = sorted(
        path for path in (place / ".distil" / "store" / "data" / "targets").glob("*/*/targets.arrow")
    )
    os.remove(deleted)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    status = json.loads(distil("status", "tiny.toml", "--json").stdout)
    assert len(status["targets"]["missing"]) == 1
    verified = distil("verify", "tiny.toml")
    assert verified.returncode == 1
    assert verified.stdout.count("damaged  targets") == 2
    assert distil("retry", "tiny.toml").returncode == 0
    after = {kind: receipts(place, kind) for kind in before}
    assert {kind: after[kind] for kind in ("source", "shard", "blocks")} == {
        kind: before[kind] for kind in ("source", "shard", "blocks")
    }
    changed = {name for name in after["targets"] if after["targets"][name] != before["targets"][name]}
    assert changed == {f"{path.parent.parent.name}.receipt.json" for path in (deleted, flipped)}
    assert whole.exists()
    assert distil("verify", "tiny.toml").returncode == 0


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
