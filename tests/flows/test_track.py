"""MLflow: runs are found again, no step is logged twice, a model key has one version that loads."""

from pathlib import Path

import pytest

from flows.home import set_environment
from flows.track import Book, flat, open_book
from storage.fingerprint import sha256_bytes
from tasks.config import make_recipe
from tests.tiny import make_teacher

KEY = sha256_bytes(b"run")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    folder = tmp_path_factory.mktemp("mlflow")
    set_environment(str(folder))
    make_teacher(folder / "teacher")
    values = {"name": "tiny", "home": str(folder), "corpus": {"url": "x"}, "teacher": {"model": "y"}}
    return open_book(make_recipe(values, "test"))


def lines(first: int, last: int) -> list[dict[str, float]]:
    return [
        line
        for step in range(first, last + 1)
        for line in (
            {"step": step, "loss": 1 / step, "lr": 0.1, "time": 1000.0 + step},
            {"step": step, "heldout_loss": 2 / step, "time": 1000.5 + step},
        )
    ]


def test_a_resumed_run_shows_one_curve(book: Book) -> None:
    run = book.run("train", KEY, "tiny train")
    book.send(run, lines(1, 300), book.last_steps(run))
    again = book.run("train", KEY, "tiny train")
    book.send(again, lines(200, 400), book.last_steps(again))
    assert again == run
    for name in ("loss", "heldout_loss"):
        assert [metric.step for metric in book.client.get_metric_history(run, name)] == list(range(1, 401))


def test_settings_become_parameters_in_batches(book: Book) -> None:
    settings = {"train": {f"field{number}": number for number in range(150)}, "note": "x" * 7000}
    run = book.run("chain", KEY, "tiny", settings=settings)
    kept = book.client.get_run(run).data.params
    assert kept["train.field149"] == "149"
    assert len(kept) == 151
    assert len(kept["note"]) == 6000


def test_data_sets_are_noted_once(book: Book) -> None:
    run = book.run("chain", sha256_bytes(b"other"), "tiny")
    for _ in range(2):
        book.data(run, {"snapshot": ("f" * 64, "/data/oscar")})
    noted = book.client.get_run(run).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest) for one in noted] == [("snapshot", "f" * 36)]


def test_a_model_is_one_version_and_loads_as_a_pipeline(book: Book, tmp_path_factory: pytest.TempPathFactory) -> None:
    import mlflow
    from transformers import AutoModel, AutoTokenizer

    folder = make_folder(tmp_path_factory)
    run = book.run("chain", KEY, "tiny")
    sentence = "Le juge <mask> le dossier."
    first = book.register(run, "tiny", KEY, folder, sentence, {"distil.prefect_run_id": "17"})
    assert book.register(run, "tiny", KEY, folder, sentence, {}) == first
    assert book.register(run, "tiny", sha256_bytes(b"2"), folder, sentence, {}).version != first.version
    assert book.client.get_model_version_by_alias("tiny", "challenger").version == 2
    assert book.client.get_model_version("tiny", first.version).tags["distil.prefect_run_id"] == "17"
    pipeline = mlflow.transformers.load_model("models:/tiny@challenger")
    assert len(pipeline(sentence)) == 5
    inside = Path(mlflow.artifacts.download_artifacts(first.uri)) / "model"
    assert AutoTokenizer.from_pretrained(inside)("Le juge").input_ids
    assert AutoModel.from_pretrained(inside).config.num_hidden_layers == 4


def make_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("model")
    make_teacher(folder)
    return folder


def test_nested_values_become_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
