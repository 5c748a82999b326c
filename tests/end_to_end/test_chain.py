"""The chain by `distil run`: its results, a second run that has nothing to do, and a run with one truncated source."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from huggingface_hub import ModelCard
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from transformers import AutoModel, AutoTokenizer, pipeline

from tests.harness.output import refusal, tables
from tests.harness.project import TRUNCATED, History, Shell, make_project, new_artifacts
from tests.harness.recipe_values import LENGTH, STEPS
from tests.harness.tiny import write_oscar

SENTENCE = "Le maire signe <mask> avant la fin du mois."


@pytest.fixture
def client(history: History, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """The MLflow database that the run wrote."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(history.project.mlflow)
    yield MlflowClient(history.project.mlflow)
    mlflow.set_tracking_uri(before)


def runs_of(client: MlflowClient, part: str = "") -> list[Run]:
    """The runs of all experiments, of one part of the chain or of all."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`distil.part` = '{part}'" if part else ""))


def check_fill_mask(folder: Path) -> None:
    """The folder loads as users load it, with two layers and a word for the mask."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        hidden = model(**tokenizer(SENTENCE, return_tensors="pt")).last_hidden_state
    assert torch.isfinite(hidden).all()
    check_answers(pipeline("fill-mask", model=str(folder))(SENTENCE))


def check_answers(answers: list[dict[str, Any]]) -> None:
    """Five words, the likeliest first."""
    scores = [answer["score"] for answer in answers]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_up_to_max_failed_shards_may_fail(teacher: Path, server: str, tmp_path: Path) -> None:
    """The student is trained on the other shards; one more failure than allowed ends the run before the training."""
    corpus = write_oscar(tmp_path / "corpus")
    (corpus / "fr_meta_part_2.jsonl").write_text("not JSON\n" * 20, encoding="utf-8")
    project = make_project(tmp_path, corpus, teacher)
    refused = project.distil("run", server=server)
    assert refused.status == 1
    assert project.receipts("model") == []
    accepted = project.distil("run", "run.max_failed=1", server=server)
    assert accepted.status == 0, accepted.err
    assert "fr_meta_part_2.jsonl" in accepted.out + accepted.err
    assert len(project.receipts("model")) == 1
    assert not any("part_2" in one.label for one in project.receipts("targets"))


def test_the_run_ends_with_its_table(history: History) -> None:
    assert history.complete.status == 0, history.complete.err
    assert "Traceback" not in history.complete.out + history.complete.err
    texts = ("snapshot", "targets", "masked top-1", "Le camembert est <mask> :)", "student:", "distil up --home")
    for text in (*texts, "not run: score.protocol is not set"):
        assert text in history.complete.out
    assert "distilled version 1" in history.complete.out.splitlines()[-1]


def test_the_model_folder_that_it_names_loads(history: History) -> None:
    (model,) = history.project.receipts("model")
    folder = history.project.home / "models" / "tiny"
    assert folder.resolve() == history.project.store.verified_folder(model)
    assert any(str(folder) in cell for row in tables(history.complete.out) for cell in row)
    check_fill_mask(folder)


def test_the_registered_model_loads(history: History, client: MlflowClient) -> None:
    uri = "models:/distilled@challenger"
    check_fill_mask(Path(mlflow.artifacts.download_artifacts(uri)) / "model")
    check_answers(mlflow.transformers.load_model(uri)(SENTENCE))


def test_mlflow_has_settings_data_sets_curve_and_one_version(history: History, client: MlflowClient) -> None:
    (chain,) = runs_of(client, "chain")
    wanted = {"loss.distil": "0.5", "blocks.length": str(LENGTH), "train.lr": "0.001", "targets.encoding": "int8"}
    assert wanted.items() <= chain.data.params.items()
    assert {one.dataset.name for one in chain.inputs.dataset_inputs} == {"snapshot", "manifest"}
    (train,) = runs_of(client, "train")
    assert train.data.tags["mlflow.parentRunId"] == chain.info.run_id
    assert {run.info.status for run in (chain, train)} == {"FINISHED"}
    for name in ("loss", "distil", "cosine", "mlm"):
        curve = client.get_metric_history(train.info.run_id, name)
        assert [metric.step for metric in curve] == list(range(1, STEPS + 1))
    (version,) = client.search_model_versions("name = 'distilled'")
    (model,) = history.project.receipts("model")
    assert version.tags["distil.model_key"] == model.key
    assert client.get_model_version_by_alias("distilled", "challenger").version == version.version


def test_mlflow_has_the_teachers_perplexity_on_heldout_text(client: MlflowClient) -> None:
    (scores,) = runs_of(client, "score-heldout")
    assert scores.info.status == "FINISHED"
    assert scores.data.metrics["teacher_perplexity"] > 1


def test_the_gate_refuses_an_unscored_model_with_its_reason(history: History, client: MlflowClient) -> None:
    tags = client.get_model_version("distilled", "1").tags
    reason = "fine-tuning was not run: score.protocol is not set"
    assert tags["distil.gate.decision"] == "refused"
    assert tags["distil.gate.reason"].startswith(reason)
    assert "champion" not in client.get_registered_model("distilled").aliases
    assert reason in " ".join(history.complete.out.split())


def test_the_model_card_and_its_figure_are_next_to_the_model_and_in_mlflow(
    history: History, client: MlflowClient
) -> None:
    folder = history.project.home / "models" / "tiny-card"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.metrics == ["accuracy"]
    assert "2 layers, distilled from `teacher`" in card.text
    assert "- fine-tuning (student): score.protocol is not set" in card.text
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    model = Path(mlflow.artifacts.download_artifacts("models:/distilled@challenger")) / "model"
    assert {"README.md", "scores.png", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}


def test_status_counts_every_stage(history: History, shell: Shell) -> None:
    rows = json.loads(shell("status", history.project.recipe, "--json").out)
    for stage in ("source", "shard", "blocks", "calibration", "targets", "model"):
        assert rows[stage]["done"] == rows[stage]["wanted"] > 0, stage
        assert not rows[stage]["missing"], stage
    assert rows["targets"]["bytes"] > 0


def test_mlflow_leads_to_a_prefect_run_that_completed(history: History, client: MlflowClient) -> None:
    (chain,) = runs_of(client, "chain")
    with sqlite3.connect(f"file:{history.project.home}/prefect/prefect.db?mode=ro", uri=True) as database:
        rows = database.execute("select id, name, state_type from flow_run").fetchall()
    assert [(str(name), state) for _, name, state in rows] == [("tiny", "COMPLETED")]
    assert chain.data.tags["distil.prefect_run_id"].replace("-", "") == str(rows[0][0]).replace("-", "")
    (version,) = client.search_model_versions("name = 'distilled'")
    assert version.tags["distil.prefect_run_id"] == chain.data.tags["distil.prefect_run_id"]


def test_a_second_run_has_nothing_to_do(history: History, client: MlflowClient) -> None:
    assert history.repeated.status == 0, history.repeated.err
    assert "nothing to do" in history.repeated.out
    assert history.repeated_times == history.complete_times
    assert len(client.search_model_versions("name = 'distilled'")) == 1
    assert len(runs_of(client, "chain")) == len(runs_of(client, "train")) == 1


def test_a_truncated_source_fails_alone_with_its_name(history: History) -> None:
    assert TRUNCATED in refusal(history.truncated)
    heading, row = tables(history.truncated.out)
    said = dict(zip(heading, row, strict=True))
    assert (said["stage"], said["file"]) == ("source", TRUNCATED)
    assert said["howtoretry"] == f"distilretry{history.project.recipe}--stagesource--shardfr_meta_part_2"
    done = {(kind, label) for kind, label, _ in history.truncated_times}
    kinds = {"source", "shard", "blocks", "targets"}
    whole = {(kind, label) for kind, label, _ in history.complete_times if kind in kinds}
    others = {one for one in whole if "part_2" not in one[1]}
    assert {kind for kind, _ in others} == kinds
    assert others <= done
    assert not {kind for kind, label in done if "part_2" in label} & {"source", "blocks", "targets"}
    assert not {kind for kind, _ in done} & {"model", "checkpoint"}


def test_the_same_command_computes_only_the_replaced_source(history: History) -> None:
    fresh = new_artifacts(history.truncated_times, history.complete_times)
    data = {(kind, label) for kind, label in fresh if kind not in ("checkpoint", "model", "scores")}
    assert {kind for kind, _ in data} == {"source", "shard", "blocks", "targets"}
    assert all("part_2" in label for _, label in data)
    assert {("model", "tiny")} <= fresh
