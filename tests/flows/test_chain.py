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
    for word in ("masked top-1", "not run: score.ner names no set", "student:", "mlflow ui", "version 1"):
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
