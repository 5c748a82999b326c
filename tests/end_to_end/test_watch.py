"""A snapshot that arrives piece by piece: announced by an event, taken once, trained on from the champion."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.client.schemas.objects import FlowRun

from flows.home import set_environment
from flows.pipeline.already_done import remember_done
from flows.tracking.mlflow_runs import open_mlflow_runs
from flows.tracking.model_registry import CHAMPION
from tasks.lineage import Workspace
from tasks.recipe.load import load_recipe
from tasks.recipe.run_json import read_run
from tests.harness.processes import LIMIT, wait_for
from tests.harness.project import History, Project, ended, environment, new_artifacts
from tests.harness.servers.prefect_server import PrefectServer, serving
from tests.harness.tiny import write_oscar, write_sums

pytestmark = pytest.mark.slow

EVENT = ["prefect", "event", "emit", "corpus.snapshot.published", "--resource-id", "corpus.tiny"]
"""The command of a publisher of snapshots."""
WATCH = """
[watch]
folder = {folder}
settle_seconds = 1
warm_start = "champion"
"""


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with serving(tmp_path_factory.mktemp("server")) as own_server:
        own_server.create_pool()
        own_server.start_worker()
        yield own_server


@pytest.fixture
def project(history: History, own_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of the history's store; its model is the champion, its corpus the snapshot 2026-9; all deployed."""
    sources = Path(shutil.copytree(history.project.folder / "corpus", tmp_path / "oscar" / "2026-9"))
    # By their checksums the store knows the copies; without, a run would have to read them first.
    write_sums(sources, *sources.iterdir())
    project = history.project.copy(tmp_path / "project", corpus=sources)
    with project.recipe.open("a", encoding="utf-8") as file:
        file.write(WATCH.format(folder=json.dumps(str(sources.parent))))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    set_environment(str(project.home))
    (model,) = project.receipts("model")
    recipe = load_recipe(project.recipe)
    mlflow_runs = open_mlflow_runs(recipe)
    run = mlflow_runs.start_or_resume_run("chain", model.parents[0], "tiny")
    mlflow_runs.registry.register(
        run, "distilled", model.key, project.store.local_folder(model), "Le juge <mask> le dossier.", {}
    )
    mlflow_runs.client.set_registered_model_alias("distilled", CHAMPION, "1")
    # This home's MLflow has no record of the run; the store remembers it as recorded.
    specs = (read_run(str(path)) for path in (history.project.home / "run").glob("*/run.json"))
    remember_done(Workspace(project.store, recipe), next(run for run in specs if run.run_key == model.parents[0]), {})
    deployed = project.distil("deploy", server=own_server.url)
    assert deployed.status == 0, deployed.err
    return project


def runs_of(own_server: PrefectServer, flow: str) -> list[FlowRun]:
    with own_server.client as client:
        wanted = client.read_flow_by_name(flow).id
        return [run for run in client.read_flow_runs() if run.flow_id == wanted]


@pytest.mark.guard
def test_a_snapshot_copied_in_slowly_starts_one_run_that_computes_only_what_is_new(
    project: Project, own_server: PrefectServer, tmp_path: Path
) -> None:
    older, newer = tmp_path / "oscar" / "2026-9", tmp_path / "oscar" / "2026-10"
    files = [*sorted(older.glob("fr_meta*")), write_oscar(tmp_path / "later", parts=4) / "fr_meta_part_4.jsonl"]
    write_sums(newer, *files)
    for file in files[:-1]:
        shutil.copyfile(file, newer / file.name)
    early = project.distil("watch", server=own_server.url)
    assert early.status == 0, early.err
    assert (
        "2026-10 is not complete yet: fr_meta_part_4.jsonl is listed in a checksum file but does not exist" in early.out
    )
    assert "; nothing new: 2026-9 (" in early.out
    assert "was processed before" in early.out
    assert runs_of(own_server, "distill") == []

    before = project.creation_times()
    shutil.copyfile(files[-1], newer / files[-1].name)
    by_hand = project.start("watch", server=own_server.url)
    variables = environment(tmp_path, own_server.url)
    subprocess.run([sys.executable, "-m", *EVENT], env=variables, check=True, timeout=LIMIT, stdout=subprocess.PIPE)
    said = ended(by_hand)
    assert said.status == 0, said.err
    wait_for(lambda: [run for run in runs_of(own_server, "watch-snapshots") if run.deployment_id])
    (by_event,) = (run for run in runs_of(own_server, "watch-snapshots") if run.deployment_id)
    watched = own_server.wait(by_event.id, "COMPLETED")
    (run,) = runs_of(own_server, "distill")
    assert watched.state
    for sentence in (said.out, str(watched.state.message)):
        assert str(run.id) in sentence
    assert run.parameters["recipe"]["corpus"]["url"] == str(newer)
    assert run.parameters["recipe"]["train"]["warm_start"] == "models:/distilled/1"

    own_server.wait(run.id, "COMPLETED")
    fresh = new_artifacts(before, project.creation_times())
    data = {(kind, label) for kind, label in fresh if kind not in ("checkpoint", "model", "scores")}
    assert {kind for kind, _ in data} == {"source", "shard", "blocks", "targets"}
    assert all(label.startswith("fr_meta_part_4") for _, label in data)
    assert ("model", "tiny") in fresh
    assert len(MlflowClient(project.mlflow).search_model_versions("name = 'distilled'")) == 2
    (spec,) = (path for path in (project.home / "run").glob("*/run.json"))
    start = Path(json.loads(spec.read_text())["train"]["warm_start"])
    (first, *_) = sorted(project.receipts("model"), key=lambda receipt: receipt.created)
    weights = project.store.local_folder(first) / "model.safetensors"
    assert (start / "model.safetensors").read_bytes() == weights.read_bytes()

    again = project.distil("watch", server=own_server.url)
    assert "nothing new: 2026-10 (" in again.out
    assert len(runs_of(own_server, "distill")) == 1
