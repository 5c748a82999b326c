"""Planned trainings: a registered warm start becomes a folder, and the run is keyed by the content of that model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.home import set_environment
from flows.inventory import planned_training
from flows.tracking.mlflow_runs import open_mlflow_runs
from flows.tracking.model_registry import CHAMPION, fetch_model
from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.lineage import Workspace, vocabulary_of
from tasks.recipe.config import Recipe
from tasks.recipe.run_json import RunSpec
from tasks.tokens.blocks import make_blocks
from tests.harness.recipe_values import teacherless_recipe
from tests.harness.tiny import make_teacher, write_oscar


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with blocks, two models, and MLflow where the first is version 1 and champion, the second version 2."""
    folder = tmp_path_factory.mktemp("start")
    set_environment(str(folder))
    write_oscar(folder / "corpus", parts=1, texts=8)
    make_teacher(folder / "model")
    make_teacher(folder / "other", layers=3)
    recipe = recipe_of(folder)
    mlflow_runs = open_mlflow_runs(recipe)
    run = mlflow_runs.start_or_resume_run("chain", "0" * 64, "tiny")
    for name in ("model", "other"):
        mlflow_runs.registry.register(run, "distilled", name, folder / name, "Le juge <mask> le dossier.", {})
    mlflow_runs.client.set_registered_model_alias("distilled", CHAMPION, "1")
    store = Store(recipe.store)
    for source, _ in Workspace(store, recipe).lineage.sources:
        shard_source(store, source, recipe.corpus)
    for shard in Workspace(store, recipe).lineage.shards:
        make_blocks(store, shard, recipe.blocks, vocabulary_of(recipe))
    return folder


def recipe_of(place: Path, start: str = "", home: Path | None = None) -> Recipe:
    values = {
        "home": str(home or place),
        "store": str(place / "store"),
        "corpus": {"url": str(place / "corpus"), "heldout_per_mille": 0},
        "student": {"init": "config", "config": {"model_type": "camembert"}},
        "train": {"warm_start": start},
        "register": {"tracking_uri": f"sqlite:///{place}/mlflow/mlflow.db"},
    }
    return teacherless_recipe(place / "model", **values)


def planned(place: Path, start: str, home: Path | None = None) -> RunSpec:
    recipe = recipe_of(place, start, home)
    return planned_training(Workspace(Store(recipe.store), recipe))


def test_the_same_model_gives_the_same_run_by_alias_number_or_folder_and_on_any_machine(
    place: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(place / "model", tmp_path / "copy")
    named = ["models:/distilled@champion", "models:/distilled/1", str(place / "model"), str(copy)]
    runs = [planned(place, start) for start in named] + [planned(place, named[0], home=tmp_path / "elsewhere")]
    assert len({run.run_key for run in runs}) == 1
    assert all((Path(run.train.warm_start) / "model.safetensors").is_file() for run in runs)
    assert Path(runs[-1].train.warm_start).is_relative_to(tmp_path)
    others = {planned(place, start).run_key for start in ("", "models:/distilled/2")}
    assert len(others | {runs[0].run_key}) == 3


def test_a_registered_model_is_fetched_once_and_completely(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, home=tmp_path)
    folder = fetch_model(recipe, "models:/distilled/1")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fetch_model(recipe, "models:/distilled@champion") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert [path.name for path in folder.parents[1].iterdir()] == [folder.parent.name]


@pytest.mark.parametrize("start", ["models:/distilled@absent", "models:/distilled/9", "models:/nothing@champion"])
def test_a_model_that_is_not_registered_is_one_sentence(place: Path, start: str) -> None:
    with pytest.raises(FatalError, match=f"^MLflow has no registered model {start}; correct the name"):
        planned(place, start)


SECONDS_TO_IMPORT = {"torch", "transformers", "prefect", "mlflow"}


@pytest.mark.parametrize(
    ("modules", "may"), [("flows.pipeline.already_done, flows.views.status", set()), ("flows.watch", {"prefect"})]
)
def test_checking_the_store_imports_no_slow_module(modules: str, may: set[str], environment: dict[str, str]) -> None:
    code = f"import sys, {modules}; print(*sorted({SECONDS_TO_IMPORT} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) == may
