"""MLflow: runs are found again, no step is logged twice, a model key has one version that loads."""

from pathlib import Path

import pytest

from flows.home import set_environment
from flows.track import Book, flat, open_book
from storage.error import FatalError
from storage.fingerprint import sha256_bytes
from tasks.recipe import make_recipe
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


def test_a_run_that_was_killed_before_its_settings_gets_those_that_it_lacks(book: Book) -> None:
    key = sha256_bytes(b"killed")
    tags = {"distil.run_key": key, "distil.part": "chain"}
    killed = book.client.create_run(book.experiment, tags=tags).info.run_id
    book.client.log_param(killed, "run.workers", "1")
    assert book.run("chain", key, "tiny", settings={"run": {"workers": 2}, "train": {"lr": 0.1}}) == killed
    assert book.client.get_run(killed).data.params == {"run.workers": "1", "train.lr": "0.1"}


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


def test_a_version_that_was_killed_before_its_alias_gets_it_but_takes_it_from_no_newer_one(
    book: Book, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = make_folder(tmp_path_factory), book.run("chain", sha256_bytes(b"half"), "half")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(book.client, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            book.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    again = book.register(run, "half", KEY, folder, "Le juge <mask>.", {})
    assert again == book.version("half")
    assert set(again.tags) == {"distil.model_key"}
    assert len(book.client.search_model_versions("name = 'half'")) == 1
    newer = book.register(run, "half", sha256_bytes(b"2"), folder, "Le juge <mask>.", {})
    assert book.register(run, "half", KEY, folder, "Le juge <mask>.", {}) == again
    assert book.version("half") == newer


def test_files_of_a_result_lie_beside_the_weights(book: Book, tmp_path_factory: pytest.TempPathFactory) -> None:
    import mlflow

    run = book.run("chain", sha256_bytes(b"kept"), "kept")
    book.register(run, "kept", KEY, make_folder(tmp_path_factory), "Le juge <mask>.", {})
    book.keep(run, {"README.md": "# Modèle".encode()}, book.named("models:/kept@challenger"))
    inside = Path(mlflow.artifacts.download_artifacts("models:/kept/1")) / "model"
    assert (inside / "README.md").read_text(encoding="utf-8") == "# Modèle"
    assert (inside / "model.safetensors").exists()
    assert [file.path for file in book.client.list_artifacts(run)] == ["README.md"]
    assert book.named("models:/kept/1") == book.version("kept")


def make_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("model")
    make_teacher(folder)
    return folder


def test_nested_values_become_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_artifacts_lie_where_the_recipe_says_and_stay_there(book: Book, tmp_path: Path) -> None:
    wanted = (tmp_path / "artifacts").as_uri()
    home = book.uri.removeprefix("sqlite:///").removesuffix("/mlflow/mlflow.db")
    values = {"name": "tiny", "home": home, "corpus": {"url": "x"}, "teacher": {"model": "y"}}

    def opened(artifacts: str) -> Book:
        settings = {"experiment": "elsewhere", "artifacts": artifacts}
        return open_book(make_recipe(values | {"register": settings}, "test"))

    run = opened(wanted).run("chain", KEY, "tiny")
    book.client.log_dict(run, {"a": 1}, "a.json")
    assert list((tmp_path / "artifacts").rglob("a.json"))
    assert opened("").experiment == opened(f"{wanted}/").experiment
    with pytest.raises(FatalError, match=r"keeps its artifacts in .*; name another register\.experiment"):
        opened("s3://bucket/mlflow")


@pytest.mark.parametrize("field", ["store", "corpus.url", "register.artifacts"])
def test_a_url_with_a_password_is_refused_by_its_field_and_not_repeated(field: str) -> None:
    values = {"name": "tiny", "corpus": {"url": "x"}, "teacher": {"model": "y"}, "register": {}}
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = "s3://KEY:SECRET@bucket/x"
    with pytest.raises(FatalError, match=f"{field} holds a password.*environment") as caught:
        make_recipe(values, "test")
    assert "SECRET@" not in str(caught.value)
