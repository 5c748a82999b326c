"""The watcher with a real server and deployment: which snapshots start a run, when, and how often."""

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.states import Failed

from flows import watch
from flows.home import open_store, set_environment, tracking_uri
from flows.watch import CHECKS_TOPIC, watch_snapshots
from tasks.corpus.listing import list_folder
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths
from tests.harness.recipe_values import teacherless_recipe
from tests.harness.tiny import save_tokenizer, write_oscar, write_sums

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module", autouse=True)
def deployment(prefect_api: None, repo: Path) -> None:
    """`distill/tiny`, which no worker executes here."""
    RunnerDeployment.from_entrypoint(f"{repo}/flows/distill.py:distill", name="tiny").apply()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_watched_recipe(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRecipe:
    """Makes recipes: `make_watched_recipe(folder=…)` watches the snapshots in `folder`, else the one in `url`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    set_environment(str(tmp_path))

    def recipe(url: object = tmp_path / "corpus", name: str = "tiny", **settings: Any) -> Recipe:
        values = {
            "name": name,
            "home": str(tmp_path),
            "corpus": {"url": str(url)},
            "run": {"retries": 0},
            "watch": {"settle_seconds": 0.3} | settings,
        }
        return with_absolute_paths(teacherless_recipe(tokenizer, **values))

    return recipe


def tick(recipe: Recipe, ends: str = "COMPLETED") -> str:
    """Runs the watcher once; returns its message."""
    state = watch_snapshots(recipe, return_state=True)
    assert state.type.value == ends, state
    return str(state.message)


def runs_for(recipe: Recipe) -> list[FlowRun]:
    """Runs of `distill` for this store; the server has those of other tests too."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["tiny"])),
            sort=FlowRunSort.START_TIME_DESC,
        )
    made = [run for run in runs if "recipe" in run.parameters]
    return [run for run in made if run.parameters["recipe"]["store"] == recipe.store]


def corpora_of(runs: list[FlowRun]) -> list[str]:
    return [run.parameters["recipe"]["corpus"]["url"] for run in runs]


# ---- one folder that grows -----------------------------------------------------------------------------------


def test_a_slow_copy_starts_one_run_once_it_is_complete(make_watched_recipe: MakeRecipe, tmp_path: Path) -> None:
    first, second = sorted(write_oscar(tmp_path / "source", parts=2, texts=8).iterdir())
    corpus, recipe = tmp_path / "corpus", make_watched_recipe()
    write_sums(corpus, first, second)
    assert tick(recipe) == (
        "corpus is not complete yet: fr_meta_part_1.jsonl is listed in a checksum file but does not exist (and 1 more)"
    )
    (corpus / first.name).write_bytes(first.read_bytes())
    assert "corpus is not complete yet: fr_meta_part_2.jsonl is listed" in tick(recipe)

    whole, last, done = second.read_bytes(), corpus / second.name, threading.Event()

    def copy() -> None:
        with last.open("wb", buffering=0) as file:
            while not done.wait(0.02):  # for as long as the watcher needs to see it grow
                file.write(b"12345")
        last.write_bytes(whole[:-100])

    copying = threading.Thread(target=copy)
    last.write_bytes(b"")
    copying.start()
    assert tick(recipe) == "corpus is not complete yet: its files are still changing"
    done.set()
    copying.join()
    assert runs_for(recipe) == []

    last.write_bytes(whole)
    said = tick(recipe)
    (run,) = runs_for(recipe)
    assert said.startswith("snapshot corpus (")
    assert said.endswith(f"taken: run {run.name} ({run.id})")
    assert run.parameters["recipe"] == recipe.model_dump(mode="json", by_alias=True)
    assert "taken before, run tiny" in tick(recipe)
    assert runs_for(recipe) == [run]


def test_an_earlier_check_with_the_same_files_is_enough(
    make_watched_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_watched_recipe(write_oscar(tmp_path / "corpus", parts=1), settle_seconds=3600)
    seen = {"listing": list_folder(recipe.corpus.url).fingerprint, "since": time.time() - 3700}
    open_store(recipe).remember(CHECKS_TOPIC, recipe.corpus.url, seen)
    monkeypatch.setattr(watch, "time", SimpleNamespace(time=time.time))  # so that it cannot wait
    assert "taken: run" in tick(recipe)


def test_a_snapshot_that_failed_is_started_again_only_when_its_files_changed(
    make_watched_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (source,) = write_oscar(tmp_path / "source", parts=1).iterdir()
    recipe = make_watched_recipe()
    write_sums(tmp_path / "corpus", source)
    wrong = bytearray(source.read_bytes())
    wrong[100] ^= 1
    (tmp_path / "corpus" / source.name).write_bytes(wrong)
    tick(recipe)
    (run,) = runs_for(recipe)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Failed(message="wrong checksum"), force=True)
    assert "taken before" in tick(recipe)
    assert len(runs_for(recipe)) == 1
    (tmp_path / "corpus" / source.name).write_bytes(source.read_bytes())
    assert "taken: run" in tick(recipe)
    assert len(runs_for(recipe)) == 2


def test_two_watchers_at_once_start_one_run(
    make_watched_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have finished all reads of the store before either sends its request to the server."""
    recipe = make_watched_recipe(write_oscar(tmp_path / "corpus", parts=1))
    both = threading.Barrier(2, timeout=180)

    def wait_for_the_other(*arguments: Any) -> None:
        both.wait()

    monkeypatch.setattr(watch, "all_done", wait_for_the_other)
    with ThreadPoolExecutor(2) as threads:
        ticks = [threads.submit(contextvars.copy_context().run, tick, recipe) for _ in range(2)]
        said = {one.result() for one in ticks}
    (run,) = runs_for(recipe)
    assert len(said) == 1
    assert str(run.id) in said.pop()


# ---- subfolders ------------------------------------------------------------------------------------------------


def test_the_newest_complete_subfolder_is_taken_and_no_older_one_after_it(
    make_watched_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "oscar"
    for name in ("2026-8", "2026-9", ".tmp"):
        write_oscar(folder / name, parts=1)
    (folder / "latest").symlink_to(folder / "2026-8")
    (folder / "2026-10").mkdir()
    recipe = make_watched_recipe(folder=str(folder))
    said = tick(recipe)
    assert said.startswith("2026-10 is not complete yet: it is empty; snapshot 2026-9 (")
    assert "taken before" in tick(recipe)
    write_oscar(folder / "2026-10", parts=2)
    assert tick(recipe).startswith("snapshot 2026-10 (")
    assert tick(recipe).startswith("nothing new: 2026-10 (")
    assert sorted(corpora_of(runs_for(recipe))) == [f"{folder}/2026-10", f"{folder}/2026-9"]


def test_snapshots_may_be_on_any_file_system(make_watched_recipe: MakeRecipe, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    recipe = make_watched_recipe(folder="memory://watched")
    memory.makedirs("/watched")
    assert tick(recipe) == "nothing new: memory://watched contains no snapshot yet"
    (source,) = write_oscar(tmp_path / "source", parts=1).iterdir()
    memory.pipe_file("/watched/2026-10/fr_sha256.txt", f"{'0' * 64} {source.name}\n".encode())
    assert "2026-10 is not complete yet" in tick(recipe)
    memory.pipe_file(f"/watched/2026-10/{source.name}", source.read_bytes())
    assert "snapshot 2026-10 (" in tick(recipe)
    assert corpora_of(runs_for(recipe)) == ["memory://watched/2026-10"]


# ---- the run that is started -------------------------------------------------------------------------------------


def test_the_run_starts_from_the_version_of_the_present_champion(
    make_watched_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_watched_recipe(write_oscar(tmp_path / "corpus", parts=1), warm_start="champion")
    tick(recipe)
    (cold,) = runs_for(recipe)
    assert cold.parameters["recipe"]["train"]["warm_start"] == ""

    client = MlflowClient(tracking_uri(recipe))
    client.create_registered_model("distilled")
    for _ in range(2):
        client.create_model_version("distilled", str(tmp_path))
    client.set_registered_model_alias("distilled", "champion", "1")
    write_oscar(tmp_path / "corpus", parts=2)
    tick(recipe)
    (warm,) = (run for run in runs_for(recipe) if run.id != cold.id)
    assert warm.parameters["recipe"]["train"]["warm_start"] == "models:/distilled/1"


# ---- errors -------------------------------------------------------------------------------------------------------


def test_a_missing_deployment_is_reported_each_time(make_watched_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_watched_recipe(write_oscar(tmp_path / "corpus", parts=1), name="absent")
    for _ in range(2):
        said = tick(recipe, ends="FAILED")
        assert said == "the Prefect server has no deployment distill/absent; run `distil deploy` first"


def test_a_missing_folder_fails_with_its_name(make_watched_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert f"corpus.url {tmp_path}/corpus does not exist" in tick(make_watched_recipe(), ends="FAILED")
    assert "watch.folder" in tick(make_watched_recipe(folder=str(tmp_path / "no")), ends="FAILED")


def test_half_a_checksum_file_is_a_copy_in_progress_until_it_stays_half(
    make_watched_recipe: MakeRecipe, tmp_path: Path
) -> None:
    corpus = write_oscar(tmp_path / "corpus", parts=1)
    (corpus / "fr_sha256.txt").write_text("0123456789abc")
    assert "corpus is not complete yet: fr_sha256.txt, line 1: expected `sha256 name`" in tick(
        make_watched_recipe(settle_seconds=3600)
    )
    assert tick(make_watched_recipe(settle_seconds=0), ends="FAILED").startswith("fr_sha256.txt, line 1")
