"""MLflow runs: resumed after a crash, no step logged twice, artifacts where the recipe says."""

from pathlib import Path

import pytest

from flows.tracking.mlflow_runs import MlflowRuns, flat, open_mlflow_runs
from storage.errors import FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tasks.recipe.load import make_recipe
from tests.harness.recipe_values import recipe_values, simple_recipe

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


def test_a_resumed_run_shows_one_curve(mlflow_runs: MlflowRuns) -> None:
    run = mlflow_runs.start_or_resume_run("train", KEY, "tiny train")
    mlflow_runs.log_curves(run, lines(1, 300), mlflow_runs.last_steps(run))
    again = mlflow_runs.start_or_resume_run("train", KEY, "tiny train")
    mlflow_runs.log_curves(again, lines(200, 400), mlflow_runs.last_steps(again))
    assert again == run
    for name in ("loss", "heldout_loss"):
        assert [metric.step for metric in mlflow_runs.client.get_metric_history(run, name)] == list(range(1, 401))


def test_lines_that_mlflow_did_not_receive_are_sent_again(
    mlflow_runs: MlflowRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mlflow_runs.start_or_resume_run("train", sha256_bytes(b"away"), "tiny train")
    last = mlflow_runs.last_steps(run)
    with monkeypatch.context() as away:

        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError("MLflow is away")

        away.setattr(mlflow_runs.client, "log_batch", refuse)
        with pytest.raises((ConnectionError, RetryableError)):
            mlflow_runs.log_curves(run, lines(1, 5), last)
    mlflow_runs.log_curves(run, lines(1, 8), last)
    assert [metric.step for metric in mlflow_runs.client.get_metric_history(run, "loss")] == list(range(1, 9))


def test_settings_become_parameters_in_batches(mlflow_runs: MlflowRuns) -> None:
    settings = {"train": {f"field{number}": number for number in range(150)}, "note": "x" * 7000}
    run = mlflow_runs.start_or_resume_run("chain", KEY, "tiny", settings=settings)
    kept = mlflow_runs.client.get_run(run).data.params
    assert kept["train.field149"] == "149"
    assert len(kept) == 151
    assert len(kept["note"]) == 6000


def test_a_run_that_was_killed_before_its_settings_gets_the_missing_ones(mlflow_runs: MlflowRuns) -> None:
    key = sha256_bytes(b"killed")
    tags = {"distil.run_key": key, "distil.part": "chain"}
    killed = mlflow_runs.client.create_run(mlflow_runs.experiment, tags=tags).info.run_id
    mlflow_runs.client.log_param(killed, "run.workers", "1")
    assert (
        mlflow_runs.start_or_resume_run("chain", key, "tiny", settings={"run": {"workers": 2}, "train": {"lr": 0.1}})
        == killed
    )
    assert mlflow_runs.client.get_run(killed).data.params == {"run.workers": "1", "train.lr": "0.1"}


def test_data_sets_are_logged_once(mlflow_runs: MlflowRuns) -> None:
    run = mlflow_runs.start_or_resume_run("chain", sha256_bytes(b"other"), "tiny")
    for _ in range(2):
        mlflow_runs.log_inputs(run, {"snapshot": ("f" * 64, "/data/oscar")})
    inputs = mlflow_runs.client.get_run(run).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest) for one in inputs] == [("snapshot", "f" * 36)]


def test_nested_values_become_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def open_experiment(runs: MlflowRuns, name: str, **register: str) -> MlflowRuns:
    """An experiment of this name in the same MLflow."""
    home = runs.uri.removeprefix("sqlite:///").removesuffix("/mlflow/mlflow.db")
    return open_mlflow_runs(simple_recipe(home=home, register={"experiment": name, **register}))


def experiment_kind(runs: MlflowRuns) -> str | None:
    kind: str | None = runs.client.get_experiment(runs.experiment).tags.get("mlflow.experimentKind")
    return kind


def test_a_new_experiment_has_the_kind_of_model_training(mlflow_runs: MlflowRuns) -> None:
    assert experiment_kind(open_experiment(mlflow_runs, "new")) == "custom_model_development"


def test_an_existing_experiment_gets_the_kind_of_model_training_unless_it_has_one(mlflow_runs: MlflowRuns) -> None:
    mlflow_runs.client.create_experiment("without kind")
    mlflow_runs.client.create_experiment("with kind", tags={"mlflow.experimentKind": "finetuning"})
    assert experiment_kind(open_experiment(mlflow_runs, "without kind")) == "custom_model_development"
    assert experiment_kind(open_experiment(mlflow_runs, "with kind")) == "finetuning"


def test_artifacts_are_kept_where_the_recipe_says_for_good(mlflow_runs: MlflowRuns, tmp_path: Path) -> None:
    wanted = (tmp_path / "artifacts").as_uri()

    def opened(artifacts: str) -> MlflowRuns:
        return open_experiment(mlflow_runs, "elsewhere", artifacts=artifacts)

    run = opened(wanted).start_or_resume_run("chain", KEY, "tiny")
    mlflow_runs.client.log_dict(run, {"a": 1}, "a.json")
    assert list((tmp_path / "artifacts").rglob("a.json"))
    assert opened("").experiment == opened(f"{wanted}/").experiment
    with pytest.raises(FatalError, match=r"stores its artifacts in .*; set register\.experiment to a new name"):
        opened("s3://bucket/mlflow")


@pytest.mark.parametrize("field", ["store", "corpus.url", "register.artifacts"])
def test_a_url_with_a_password_is_refused_by_its_field_and_not_repeated(field: str) -> None:
    values = recipe_values(register={})
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = "s3://KEY:SECRET@bucket/x"
    with pytest.raises(FatalError, match=f"{field} contains a password.*environment") as caught:
        make_recipe(values, "test")
    assert "SECRET@" not in str(caught.value)


def test_a_password_of_mlflow_is_taken_from_the_environment_only() -> None:
    values = recipe_values(register={"tracking_uri": "postgresql+psycopg2://me:SECRET@db/mlflow"})
    with pytest.raises(FatalError, match=r"tracking_uri contains a password.*MLFLOW_TRACKING_URI") as caught:
        make_recipe(values, "test")
    assert "SECRET@" not in str(caught.value)
