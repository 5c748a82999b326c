"""MLflow's models: a model key has one version that loads, with its alias and what lies beside the weights."""

from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from flows.tracking import registry
from flows.tracking.runs import MlflowRuns
from storage.errors import DistilError, FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tasks.recipe.load import make_recipe
from tests.harness.tiny import make_teacher

KEY = sha256_bytes(b"run")


def test_a_model_is_one_version_and_loads_as_a_pipeline(
    book: MlflowRuns, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import mlflow
    from transformers import AutoModel, AutoTokenizer

    folder = make_folder(tmp_path_factory)
    run = book.run("chain", KEY, "tiny")
    sentence = "Le juge <mask> le dossier."
    first = book.registry.register(run, "tiny", KEY, folder, sentence, {"distil.prefect_run_id": "17"})
    assert book.registry.register(run, "tiny", KEY, folder, sentence, {}) == first
    assert book.registry.register(run, "tiny", sha256_bytes(b"2"), folder, sentence, {}).version != first.version
    assert book.client.get_model_version_by_alias("tiny", "challenger").version == 2
    assert book.client.get_model_version("tiny", first.version).tags["distil.prefect_run_id"] == "17"
    pipeline = mlflow.transformers.load_model("models:/tiny@challenger")
    assert len(pipeline(sentence)) == 5
    inside = Path(mlflow.artifacts.download_artifacts(first.uri)) / "model"
    assert AutoTokenizer.from_pretrained(inside)("Le juge").input_ids
    assert AutoModel.from_pretrained(inside).config.num_hidden_layers == 4


def test_a_version_that_was_killed_before_its_alias_gets_it_but_takes_it_from_no_newer_one(
    book: MlflowRuns, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = make_folder(tmp_path_factory), book.run("chain", sha256_bytes(b"half"), "half")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(book.client, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            book.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    again = book.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    assert again == book.registry.version("half")
    assert set(again.tags) == {"distil.model_key"}
    assert len(book.client.search_model_versions("name = 'half'")) == 1
    newer = book.registry.register(run, "half", sha256_bytes(b"2"), folder, "Le juge <mask>.", {})
    assert book.registry.register(run, "half", KEY, folder, "Le juge <mask>.", {}) == again
    assert book.registry.version("half") == newer


def test_files_of_a_result_lie_beside_the_weights(book: MlflowRuns, tmp_path_factory: pytest.TempPathFactory) -> None:
    import mlflow

    run = book.run("chain", sha256_bytes(b"kept"), "kept")
    book.registry.register(run, "kept", KEY, make_folder(tmp_path_factory), "Le juge <mask>.", {})
    book.keep(run, {"README.md": "# Modèle".encode()}, book.registry.named("models:/kept@challenger"))
    inside = Path(mlflow.artifacts.download_artifacts("models:/kept/1")) / "model"
    assert (inside / "README.md").read_text(encoding="utf-8") == "# Modèle"
    assert (inside / "model.safetensors").exists()
    assert [file.path for file in book.client.list_artifacts(run)] == ["README.md"]
    assert book.registry.named("models:/kept/1") == book.registry.version("kept")


@pytest.mark.parametrize(
    ("raised", "expected", "said"),
    [
        (
            ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"),
            FatalError,
            "//db/mlflow needs .* psycopg2",
        ),
        (OperationalError("select", {}, Exception("refused")), RetryableError, "did not answer: .*refused"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence_without_its_password(
    raised: Exception, expected: type[DistilError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_uri: str) -> None:
        raise raised

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://me:secret@db/mlflow")
    monkeypatch.setattr(registry, "MlflowClient", refuse)
    recipe = make_recipe({"name": "tiny", "corpus": {"url": "x"}, "teacher": {"model": "y"}}, "test")
    with pytest.raises(expected, match=said) as caught:
        registry.connect(recipe)
    assert "secret" not in str(caught.value)


def make_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("model")
    make_teacher(folder)
    return folder
