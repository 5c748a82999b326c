"""The whole chain by `distil run`: what it leaves, what a second run does, what one broken source costs."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from transformers import AutoModel, AutoTokenizer, pipeline

from tests.harness.place import BROKEN, LENGTH, STEPS, History, made, refusal, tables

SENTENCE = "Le maire signe <mask> avant la fin du mois."


@pytest.fixture
def client(history: History, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """The MLflow database that the run wrote."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(history.place.mlflow)
    yield MlflowClient(history.place.mlflow)
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


def test_the_run_ends_with_its_table(history: History) -> None:
    assert history.whole.status == 0, history.whole.err
    assert "Traceback" not in history.whole.out + history.whole.err
    for text in ("snapshot", "targets", "masked top-1", "Le camembert est <mask> :)", "not run: score.protocol"):
        assert text in history.whole.out
    assert "distilled version 1" in history.whole.out.splitlines()[-1]


def test_the_model_folder_that_it_names_loads(history: History) -> None:
    (model,) = history.place.receipts("model")
    folder = history.place.home / "models" / "tiny"
    assert folder.resolve() == history.place.store.check(model)
    assert any(str(folder) in cell for row in tables(history.whole.out) for cell in row)
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
    (model,) = history.place.receipts("model")
    assert version.tags["distil.model_key"] == model.key
    assert client.get_model_version_by_alias("distilled", "challenger").version == version.version


def test_mlflow_leads_to_a_prefect_run_that_completed(history: History, client: MlflowClient) -> None:
    (chain,) = runs_of(client, "chain")
    with sqlite3.connect(f"file:{history.place.home}/prefect/prefect.db?mode=ro", uri=True) as database:
        rows = database.execute("select id, name, state_type from flow_run").fetchall()
    assert [(str(name), state) for _, name, state in rows] == [("tiny", "COMPLETED")]
    assert chain.data.tags["distil.prefect_run_id"].replace("-", "") == str(rows[0][0]).replace("-", "")
    (version,) = client.search_model_versions("name = 'distilled'")
    assert version.tags["distil.prefect_run_id"] == chain.data.tags["distil.prefect_run_id"]


def test_a_second_run_does_nothing_and_says_so(history: History, client: MlflowClient) -> None:
    assert history.again.status == 0, history.again.err
    assert "nothing to do" in history.again.out
    assert history.again_stamps == history.whole_stamps
    assert len(client.search_model_versions("name = 'distilled'")) == 1
    assert len(runs_of(client, "chain")) == len(runs_of(client, "train")) == 1


def test_a_source_cut_short_is_named_and_holds_back_only_itself(history: History) -> None:
    assert BROKEN in refusal(history.broken)
    heading, row = tables(history.broken.out)
    said = dict(zip(heading, row, strict=True))
    assert (said["stage"], said["file"]) == ("source", BROKEN)
    assert said["howtoretry"] == f"distilretry{history.place.recipe}--stagesource--shardfr_meta_part_2"
    done = {(kind, label) for kind, label, _ in history.broken_stamps}
    kinds = {"source", "shard", "blocks", "targets"}
    whole = {(kind, label) for kind, label, _ in history.whole_stamps if kind in kinds}
    others = {one for one in whole if "part_2" not in one[1]}
    assert {kind for kind, _ in others} == kinds
    assert others <= done
    assert not {kind for kind, label in done if "part_2" in label} & {"source", "blocks", "targets"}
    assert not {kind for kind, _ in done} & {"model", "checkpoint"}


def test_after_mending_the_same_command_computes_only_that_source(history: History) -> None:
    fresh = made(history.broken_stamps, history.whole_stamps)
    data = {(kind, label) for kind, label in fresh if kind not in ("checkpoint", "model", "scores")}
    assert {kind for kind, _ in data} == {"source", "shard", "blocks", "targets"}
    assert all("part_2" in label for _, label in data)
    assert {("model", "tiny")} <= fresh
