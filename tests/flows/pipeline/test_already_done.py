"""A finished recipe is shown with the folders and servers of this home, also if another user ran it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.pipeline import already_done
from flows.pipeline.already_done import OLD_TABLE, Done, all_done, remember_done, show_done
from flows.views.links import location_rows
from flows.views.tables import Rows
from storage.arrow import BLOCKS_FILE
from storage.store import Store
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tests.harness.artifacts import put
from tests.harness.recipe_values import simple_recipe


def recipe_of(home: Path) -> Recipe:
    return simple_recipe(home=str(home), store=str(home.parent / "store"))


@pytest.fixture(autouse=True)
def default_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI", "PREFECT_UI_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_user_of_a_shared_store_sees_folders_of_the_own_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")  # of both
    recipe, store = recipe_of(tmp_path / "b"), Store(tmp_path / "store")
    receipt = put(store, "tiny", kind="model")
    sections: dict[str, Rows] = {
        "Made": [("tokens", "12"), ("model", "/home/a/models/tiny")],
        "Where to find it": [("the model", "pipeline('fill-mask', model='/home/a/models/tiny')")],
        "Time": [("total", "1 s")],
    }
    show_done(Workspace(store, recipe), Done("nothing to do", sections, receipt.ref))
    printed = "".join(capsys.readouterr().out.split())
    link = tmp_path / "b" / "models" / "tiny"
    assert (link / BLOCKS_FILE).read_bytes() == b"bytes"
    assert "/home/a" not in printed
    assert printed.count(str(link)) == 2


def test_a_database_has_no_page_so_the_command_for_one_is_shown(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "my home")
    rows = dict(location_rows(recipe, tmp_path, "postgresql+psycopg2://me:secret@db/mlflow"))
    assert rows["curves, models and runs"] == f"distil up --home '{tmp_path}/my home'"
    assert rows["status"] == "distil status RECIPE.toml"
    rows = dict(location_rows(recipe, tmp_path, "http://me:secret@mlflow:5000", "a.toml train.lr=1"))
    assert rows["curves and models"] == "http://mlflow:5000"
    assert rows["status"] == "distil status a.toml train.lr=1"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose model exists in the store `tmp_path/store`; no other artifact is required."""
    model = put(Store(tmp_path / "store"), "tiny", kind="model").ref
    lineage = SimpleNamespace(shards=(1,), targets=(1,), lacks=lambda store: False)
    run = SimpleNamespace(run_key="b" * 64, rows=7)
    monkeypatch.setattr("tasks.lineage._compute_lineage", lambda workspace: lineage)
    monkeypatch.setattr(already_done, "planned_key", lambda workspace: run.run_key)
    monkeypatch.setattr(already_done, "model_ref", lambda key, name: model)
    return run


def test_a_recipe_finished_with_one_mlflow_is_not_finished_with_another(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = recipe_of(tmp_path / "a"), Store(tmp_path / "store")
    remember_done(Workspace(store, recipe), run, {})
    assert all_done(Workspace(store, recipe))
    assert not all_done(Workspace(store, recipe_of(tmp_path / "b"))), "its own database has nothing of it"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    assert not all_done(Workspace(store, recipe))
    remember_done(Workspace(store, recipe), run, {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:another@mlflow:5000")
    assert all_done(Workspace(store, recipe_of(tmp_path / "b"))), "one server for both, whatever the password"


def test_a_note_of_an_earlier_version_is_read(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(Store(tmp_path / "store"), recipe_of(tmp_path / "a"))
    monkeypatch.setattr(workspace.store, "recall", lambda topic, name: {"rows": 7, OLD_TABLE: [["Made", [["a", "b"]]]]})
    done = all_done(workspace)
    assert done
    assert done.sections == {"Made": [("a", "b")]}
