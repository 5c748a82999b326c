"""`distil plan` against what a run then made, and the check for free space before a run."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from flows import plan
from flows.pipeline import preparation
from flows.views import forecast as forecast_view
from storage.errors import FatalError
from tasks.lineage import Workspace
from tasks.plan import free_space
from tasks.plan.forecast import Forecast, Prices
from tasks.plan.timing import Machine
from tasks.recipe.config import Recipe
from tasks.recipe.load import load_recipe
from tests.harness.output import refusal
from tests.harness.project import History, Project, Shell, make_project

SAMPLE = 4_000_000


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory, history: History, teacher: Path) -> tuple[Recipe, Forecast]:
    """The plan of the history's recipe, with an empty store."""
    project = make_project(tmp_path_factory.mktemp("plan"), history.project.folder / "corpus", teacher)
    recipe = load_recipe(project.recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "TIMED_SECONDS", 0.1)
        patch.setattr(plan, "describe_machine", lambda: Machine(2, 1.0))
        found = plan.forecast_of(recipe, sample_bytes=SAMPLE, prices=Prices())
    assert project.creation_times() == {}
    return recipe, found


def test_bytes_are_those_that_the_run_made(forecast: tuple[Recipe, Forecast], history: History) -> None:
    made = {kind: sum(history.project.store.sizes(kind).values()) for kind in ("shard", "blocks", "targets", "model")}
    found = forecast[1].sizes
    for kind, size in made.items():
        assert found.bytes[kind].total == pytest.approx(size, rel=0.2), kind
    assert sum(found.bytes[kind].total for kind in made) == pytest.approx(sum(made.values()), rel=0.1)
    one = max(history.project.store.sizes("checkpoint").values())
    assert found.bytes["checkpoint"].total == pytest.approx(2 * one, rel=0.2)
    receipts = history.project.receipts("targets")
    assert found.blocks.total == pytest.approx(sum(receipt.rows for receipt in receipts), rel=0.1)
    assert found.positions.total == pytest.approx(sum(one.info["positions"] for one in receipts), rel=0.1)


def test_everything_was_timed(forecast: tuple[Recipe, Forecast]) -> None:
    found = forecast[1]
    assert all(found.seconds[stage].left > 0 for stage in ("source", "blocks", "targets", "train", "score"))
    assert 1 <= found.timings.rows <= 6
    assert found.break_even is not None


def test_tables_show_the_numbers_of_the_json(forecast: tuple[Recipe, Forecast]) -> None:
    recipe, found = forecast
    out = io.StringIO()
    with redirect_stdout(out):
        forecast_view.show_forecast(recipe, found)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    shown = {cells[0]: cells[1:] for cells in lines if cells[0]}
    value: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    parts = ("total", "done", "left")
    for name, amount in value["sizes"]["bytes"].items():
        assert shown[f"{name} (bytes)"] == [forecast_view.amount_of_bytes(amount[part]) for part in parts]
    for name, amount in {key: one for key, one in value["seconds"].items() if key != "blocks"}.items():
        assert shown[name] == [forecast_view.duration(amount[part]) for part in parts]
    for one in value["choices"]:
        column = {"masked": 1, "all": 2}[one["positions"]]
        assert shown[one["encoding"]][column].startswith(forecast_view.amount_of_bytes(one["bytes"]))
    assert value["advice"].startswith(shown["recommendation"][0])


def test_what_is_done_is_not_left(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TIMED_SECONDS", 0.1)
    monkeypatch.setattr(plan, "describe_machine", lambda: Machine(2, 1.0))
    found = plan.forecast_of(load_recipe(history.project.recipe), sample_bytes=SAMPLE, prices=Prices())
    assert all(amount.left == 0 < amount.done for amount in found.sizes.bytes.values())
    assert found.total_seconds.left == 0 < found.total_seconds.total
    assert found.need == 0


def test_the_command_prints_json_and_keeps_nothing(
    history: History, teacher: Path, shell: Shell, tmp_path: Path
) -> None:
    project = make_project(tmp_path, history.project.folder / "corpus", teacher)
    result = shell("plan", project.recipe, "--json", "--prepare", "targets.source=online")
    assert result.status == 0, result.err
    value = json.loads(result.out)
    assert set(value["sizes"]["bytes"]) == {"shard", "blocks", "targets"}
    assert value["need"] > 0
    assert not project.home.joinpath("store").exists()


# ---- the check for free space ------------------------------------------------------------------------------


def check(project: Project, monkeypatch: pytest.MonkeyPatch, free: int | None, *, training: bool = True) -> None:
    recipe = load_recipe(project.recipe)
    monkeypatch.setattr(preparation, "free_bytes", lambda store: free)
    preparation.check_free_space(Workspace(project.store, recipe), training=training)


def never(*_: object, **__: object) -> None:
    raise AssertionError("nothing is to be sampled here")


def test_nothing_to_do_is_never_refused_nor_sampled(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_space, "take_sample", never)
    check(history.project, monkeypatch, free=0)
    check(history.project, monkeypatch, free=0, training=False)


def test_ample_free_space_needs_no_sample_and_an_object_store_is_not_checked(
    history: History, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(free_space, "take_sample", never)
    project = make_project(tmp_path, history.project.folder / "corpus", teacher)
    check(project, monkeypatch, free=10**12)
    check(project, monkeypatch, free=None)


def test_what_fits_by_the_forecast_is_let_in_and_what_does_not_is_not(
    forecast: tuple[Recipe, Forecast], history: History, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = make_project(tmp_path, history.project.folder / "corpus", teacher)
    need = int(forecast[1].need)
    check(project, monkeypatch, free=need + 1000)
    with pytest.raises(FatalError, match="too little free space"):
        check(project, monkeypatch, free=need - 1000)


def test_only_what_is_missing_must_fit(history: History, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project = history.project.copy(tmp_path / "project", without=("targets", "model", "checkpoint"))
    targets = sum(history.project.store.sizes("targets").values())
    check(project, monkeypatch, free=int(1.2 * targets), training=False)
    with pytest.raises(FatalError, match="too little free space"):
        check(project, monkeypatch, free=int(0.9 * targets), training=False)


def test_a_source_that_cannot_be_read_is_left_to_the_run(
    history: History, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(history.project.folder / "corpus", corpus)
    for path in corpus.iterdir():
        path.write_bytes(b'{"title": 1}\n' * 30)
    check(make_project(tmp_path / "project", corpus, teacher), monkeypatch, free=1_000)


def test_a_run_on_a_small_disk_does_not_start(
    history: History, teacher: Path, shell: Shell, small_disk: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", history.project.folder / "corpus", teacher)
    said = refusal(shell("run", project.recipe, f"store={small_disk}/store"))
    assert "too little free space" in said
    assert f"{small_disk}/store" in said
    assert "distil plan" in said
    assert not list(small_disk.rglob("*.receipt.json"))
