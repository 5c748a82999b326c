"""`distil score` for several models: one table, nested MLflow runs, and after a kill only the missing scores."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.store import Store
from tasks.lineage import Workspace
from tests.harness.eval_sets import write_ner, write_pairs
from tests.harness.processes import wait_for
from tests.harness.recipe_values import simple_recipe
from tests.harness.tiny import make_teacher

PROTOCOL = """
name = "tiny"
[tuning]
lr = [1e-3, 1e-2]
epochs = 1
batch_rows = 16
max_tokens = 32
[sets.xnli]
path = "xnli"
[sets.ner]
path = "ner"
[sets.cls-books]
path = "cls"
"""
WAIT = 240.0


@pytest.fixture(scope="module")
def command(place: Path) -> list[str]:
    """Scores two models and the recipe's teacher, by a protocol with an absent set."""
    write_pairs(place / "sets" / "xnli", train=60, test=20)
    write_ner(place / "sets" / "ner", train=60, test=20)
    (place / "protocol.toml").write_text(PROTOCOL, encoding="utf-8")
    for layers, name in ((2, "small"), (3, "middle")):
        make_teacher(place / name, layers=layers)
    settings = ["score.sets=sets", "score.latency_runs=0", "train.device=cpu"]
    return ["score", "small", "middle", "tiny.toml", "--protocol", "protocol.toml", *settings]


@pytest.fixture(scope="module")
def done(command: list[str], distil) -> "subprocess.CompletedProcess[str]":  # type: ignore[no-untyped-def]
    return distil(*command)


def labels(home: Path) -> dict[str, str]:
    """Labels and creation times of the fine-tuned scores in a store."""
    found = Store(home / "store").receipts("scores") if (home / "store").exists() else ()
    return {f"{one.label} {one.key}": one.created for one in found if one.label.split("-")[0] in ("xnli", "ner")}


@pytest.mark.slow
def test_one_table_with_intervals_for_all_models(done) -> None:  # type: ignore[no-untyped-def]
    assert done.returncode == 0, done.stderr
    for text in ("small / teacher", "xnli accuracy, %", "ner entity F1, %", "sub-word F1", "±", "not run"):
        assert text in done.stdout
    cells = re.sub(r"[│\s]+", " ", done.stdout)  # where a cell breaks depends on the length of paths
    assert "so that this file exists" in cells or "no such folder" in cells
    assert "small, middle scored" in done.stdout


@pytest.mark.slow
def test_mlflow_nests_a_child_run_a_model_and_set(done, place: Path) -> None:  # type: ignore[no-untyped-def]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("distil")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags["distil.part"] == "scores")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    by_name = {run.info.run_name: run.data.metrics for run in children}
    for model in ("small", "middle", "teacher"):
        assert {"accuracy", "accuracy.low", "accuracy.high", "macro_f1"} <= set(by_name[f"{model} xnli"])
        assert {"entity_f1", "subword.weighted_f1", "entity.by_type.PER.f1"} <= set(by_name[f"{model} ner"])
        assert "top1" in by_name[f"{model} heldout"]
    assert "against_teacher.ratio.low" in by_name["small xnli"]
    assert "against_first.difference.high" in by_name["middle ner"]
    assert "not run" in parent.data.tags["distil.score.cls-books"]
    assert "kl" in by_name["middle heldout"]


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_shows_the_same_table(done, command: list[str], distil, place: Path) -> None:  # type: ignore[no-untyped-def]
    before = labels(place / ".distil")
    assert len(before) == 2 * 3 * 3
    again = distil(*command)
    assert again.stdout == done.stdout
    assert labels(place / ".distil") == before


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_missing_pairs(  # type: ignore[no-untyped-def]
    done, command: list[str], distil, place: Path, environment: dict[str, str]
) -> None:
    home = place / "other"
    killed = [*command, f"home={home}"]
    process = subprocess.Popen([sys.executable, "-m", "flows.cli", *killed], cwd=place, env=environment)
    try:
        wait_for(lambda: len(labels(home)) >= 4)
    finally:
        children = list(below(process.pid))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for child in children:
            if Path(f"/proc/{child}").exists():
                os.kill(child, signal.SIGKILL)
    before = labels(home)
    assert 4 <= len(before) < 18
    after = distil(*killed)
    assert after.returncode == 0, after.stderr
    found = labels(home)
    assert set(found) == set(labels(place / ".distil"))
    assert {name: found[name] for name in before} == before
    assert after.stdout == done.stdout
    shutil.rmtree(home)


def below(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from below(int(child))


def test_results_are_stored_with_models_of_the_recipe_only() -> None:
    from flows.score import is_own

    recipe = simple_recipe(register={"name": "mine"})
    own = ("models:/mine@challenger", "models:/mine/3")
    assert all(is_own(recipe, uri) for uri in own)
    assert not any(is_own(recipe, uri) for uri in ("models:/mine-2@challenger", "models:/other/3", "mine/3", ""))


def test_a_comparison_leaves_models_of_other_recipes_as_they_are(tmp_path: Path) -> None:
    """A registered model of another recipe is scored and shown, but the results that its gate reads stay."""
    from flows.home import set_environment
    from flows.release.version_results import protocols_by_set
    from flows.score import record
    from flows.scoring.evaluated_models import EvaluatedModel, ScoredModels
    from flows.tracking.mlflow_runs import open_mlflow_runs

    set_environment(str(tmp_path))
    make_teacher(tmp_path / "teacher")
    values = {
        "home": str(tmp_path),
        "register": {"name": "mine", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "teacher": {"model": str(tmp_path / "teacher")},
    }
    recipe = simple_recipe(**values)
    mlflow_runs = open_mlflow_runs(recipe)
    run = mlflow_runs.start_or_resume_run("chain", "0" * 64, "a")
    for name in ("mine", "other"):
        mlflow_runs.client.create_registered_model(name)
        mlflow_runs.client.create_model_version(name, f"runs:/{run}/model", run_id=run)
    models = [EvaluatedModel(name, name, tmp_path, f"models:/{name}/1") for name in ("mine", "other")]
    record(
        Workspace(Store(tmp_path / "store"), recipe),
        models,
        ScoredModels({name: {"heldout": {"top1": 0.5, "protocol": "a" * 64}} for name in ("mine", "other")}),
    )
    assert protocols_by_set(mlflow_runs.registry.version("mine", "1")) == {"heldout": "a" * 12}
    assert protocols_by_set(mlflow_runs.registry.version("other", "1")) == {}
