"""MLflow's runs: found again, no step logged twice, artifacts where the recipe says."""

from pathlib import Path

import pytest

from flows.tracking.runs import MlflowRuns, flat, open_mlflow_runs
from storage.errors import FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tasks.recipe.load import make_recipe

KEY = sha256_bytes(b"run")


def lines(first: int, last: int) -> list[dict[str, float]]:
    return [
        line
        for step in range(first, last + 1)
        for line in (
            {"step": step, "loss": 1 / step, "lr": 0.1, "time": 1000.0 + step},
            {"step": step, "heldout_loss": 2 / step, "time": 1000.5 + step},
        )
    ]


def test_a_resumed_run_shows_one_curve(book: MlflowRuns) -> None:
    run = book.run("train", KEY, "tiny train")
    book.send(run, lines(1, 300), book.last_steps(run))
    again = book.run("train", KEY, "tiny train")
    book.send(again, lines(200, 400), book.last_steps(again))
    assert again == run
    for name in ("loss", "heldout_loss"):
        assert [metric.step for metric in book.client.get_metric_history(run, name)] == list(range(1, 401))


def test_lines_that_mlflow_did_not_get_are_sent_again(book: MlflowRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    run = book.run("train", sha256_bytes(b"away"), "tiny train")
    last = book.last_steps(run)
    with monkeypatch.context() as away:

        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError("MLflow is away")

        away.setattr(book.client, "log_batch", refuse)
        with pytest.raises((ConnectionError, RetryableError)):
            book.send(run, lines(1, 5), last)
    book.send(run, lines(1, 8), last)
    assert [metric.step for metric in book.client.get_metric_history(run, "loss")] == list(range(1, 9))


def test_settings_become_parameters_in_batches(book: MlflowRuns) -> None:
    settings = {"train": {f"field{number}": number for number in range(150)}, "note": "x" * 7000}
    run = book.run("chain", KEY, "tiny", settings=settings)
    kept = book.client.get_run(run).data.params
    assert kept["train.field149"] == "149"
    assert len(kept) == 151
    assert len(kept["note"]) == 6000


def test_a_run_that_was_killed_before_its_settings_gets_those_that_it_lacks(book: MlflowRuns) -> None:
    key = sha256_bytes(b"killed")
    tags = {"distil.run_key": key, "distil.part": "chain"}
    killed = book.client.create_run(book.experiment, tags=tags).info.run_id
    book.client.log_param(killed, "run.workers", "1")
    assert book.run("chain", key, "tiny", settings={"run": {"workers": 2}, "train": {"lr": 0.1}}) == killed
    assert book.client.get_run(killed).data.params == {"run.workers": "1", "train.lr": "0.1"}


def test_data_sets_are_noted_once(book: MlflowRuns) -> None:
    run = book.run("chain", sha256_bytes(b"other"), "tiny")
    for _ in range(2):
        book.data(run, {"snapshot": ("f" * 64, "/data/oscar")})
    noted = book.client.get_run(run).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest) for one in noted] == [("snapshot", "f" * 36)]


def test_nested_values_become_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_artifacts_lie_where_the_recipe_says_and_stay_there(book: MlflowRuns, tmp_path: Path) -> None:
    wanted = (tmp_path / "artifacts").as_uri()
    home = book.uri.removeprefix("sqlite:///").removesuffix("/mlflow/mlflow.db")
    values = {"name": "tiny", "home": home, "corpus": {"url": "x"}, "teacher": {"model": "y"}}

    def opened(artifacts: str) -> MlflowRuns:
        settings = {"experiment": "elsewhere", "artifacts": artifacts}
        return open_mlflow_runs(make_recipe(values | {"register": settings}, "test"))

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


def test_an_mlflow_with_a_password_is_told_by_the_environment_only() -> None:
    values = {"name": "tiny", "corpus": {"url": "x"}, "teacher": {"model": "y"}}
    values |= {"register": {"tracking_uri": "postgresql+psycopg2://me:SECRET@db/mlflow"}}
    with pytest.raises(FatalError, match=r"tracking_uri holds a password.*MLFLOW_TRACKING_URI") as caught:
        make_recipe(values, "test")
    assert "SECRET@" not in str(caught.value)
