"""Registered models: one version per model key, which loads with its alias and the files next to the weights."""

from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from flows.tracking import model_registry as registry
from flows.tracking.mlflow_runs import MlflowRuns
from storage.errors import DistilError, FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tests.harness.recipe_values import simple_recipe
from tests.harness.tiny import make_teacher

KEY = sha256_bytes(b"run")


def test_a_model_is_one_version_and_loads_as_a_pipeline(
    mlflow_runs: MlflowRuns, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import mlflow
    from transformers import AutoModel, AutoTokenizer

    folder = make_folder(tmp_path_factory)
    run = mlflow_runs.start_or_resume_run("chain", KEY, "tiny")
    sentence = "Le juge <mask> le dossier."
    first = mlflow_runs.registry.register(run, "tiny", KEY, folder, sentence, {"distil.prefect_run_id": "17"})
    assert mlflow_runs.registry.register(run, "tiny", KEY, folder, sentence, {}) == first
    assert mlflow_runs.registry.register(run, "tiny", sha256_bytes(b"2"), folder, sentence, {}).version != first.version
    assert mlflow_runs.client.get_model_version_by_alias("tiny", "challenger").version == 2
    assert mlflow_runs.client.get_model_version("tiny", first.version).tags["distil.prefect_run_id"] == "17"
    pipeline = mlflow.transformers.load_model("models:/tiny@challenger")
    assert len(pipeline(sentence)) == 5
    inside = Path(mlflow.artifacts.download_artifacts(first.uri)) / "model"
    assert AutoTokenizer.from_pretrained(inside)("Le juge").input_ids
    assert AutoModel.from_pretrained(inside).config.num_hidden_layers == 4


def test_an_interrupted_registration_is_completed_but_takes_no_alias_from_a_newer_version(
    mlflow_runs: MlflowRuns, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = make_folder(tmp_path_factory), mlflow_runs.start_or_resume_run("chain", sha256_bytes(b"half"), "half")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_runs.client, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            mlflow_runs.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    again = mlflow_runs.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    assert again == mlflow_runs.registry.version("half")
    assert set(again.tags) == {"distil.model_key"}
    assert len(mlflow_runs.client.search_model_versions("name = 'half'")) == 1
    newer = mlflow_runs.registry.register(run, "half", sha256_bytes(b"2"), folder, "Le juge <mask>.", {})
    assert mlflow_runs.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {}) == again
    assert mlflow_runs.registry.version("half") == newer


def test_files_of_a_result_are_next_to_the_weights(
    mlflow_runs: MlflowRuns, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import mlflow

    run = mlflow_runs.start_or_resume_run("chain", sha256_bytes(b"kept"), "kept")
    mlflow_runs.registry.register(run, "kept", KEY, make_folder(tmp_path_factory), "Le juge <mask>.", {})
    mlflow_runs.log_files(
        run, {"README.md": "# Modèle".encode()}, mlflow_runs.registry.version_at("models:/kept@challenger")
    )
    inside = Path(mlflow.artifacts.download_artifacts("models:/kept/1")) / "model"
    assert (inside / "README.md").read_text(encoding="utf-8") == "# Modèle"
    assert (inside / "model.safetensors").exists()
    assert [file.path for file in mlflow_runs.client.list_artifacts(run)] == ["README.md"]
    assert mlflow_runs.registry.version_at("models:/kept/1") == mlflow_runs.registry.version("kept")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"),
            FatalError,
            "//db/mlflow requires .* psycopg2",
        ),
        (OperationalError("select", {}, Exception("refused")), RetryableError, "did not respond: .*refused"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence_without_its_password(
    raised: Exception, expected: type[DistilError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_uri: str) -> None:
        raise raised

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://me:secret@db/mlflow")
    monkeypatch.setattr(registry, "MlflowClient", refuse)
    recipe = simple_recipe()
    with pytest.raises(expected, match=message) as caught:
        registry.connect(recipe)
    assert "secret" not in str(caught.value)


def make_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("model")
    make_teacher(folder)
    return folder
