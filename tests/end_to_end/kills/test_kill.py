"""`distil run` killed while it trains: it leaves no process, and the same command completes it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tasks.train.metrics import read_metrics
from tests.harness.processes import LIMIT, started_for, wait_for
from tests.harness.programs.slow_trainer import slow_trainer
from tests.harness.project import History, Project, environment, run_folder_of

STEPS = 300
SETTINGS = (f"train.max_steps={STEPS}", "train.checkpoint_steps=25")


def has_trained(project: Project, step: int) -> bool:
    files = list((project.home / "run").glob("*/metrics.jsonl"))
    lines = read_metrics(files[0]) if files else []
    return bool(lines) and lines[-1]["step"] >= step


def killed_at(project: Project, step: int, kill: Callable[[subprocess.Popen[str]], None]) -> None:
    """Starts the run and kills it after this step."""
    never = project.folder / "never"
    process = project.start("run", *SETTINGS, slow_trainer(step, never), start_new_session=True)
    wait_for(lambda: has_trained(project, step), process=process)
    kill(process)
    process.communicate(timeout=LIMIT)


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def undisturbed(project: Project, run: Path, folder: Path) -> str:
    """The hash of the weights that the same RUN.json gives in another store."""
    spec = json.loads(run.read_text(encoding="utf-8"))
    spec |= {"store": str(project.home / "store"), "folder": str(folder / "run")}
    path = folder / "run.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "tasks.train", str(path)]
    subprocess.run(command, env=environment(folder), cwd=folder, check=True, timeout=LIMIT, capture_output=True)
    return weights(project)


def weights(project: Project) -> str:
    (model,) = project.receipts("model")
    return next(file.sha256 for file in model.files if file.name == "model.safetensors")


@pytest.mark.guard
@pytest.mark.slow
def test_killed_twice_and_run_again(history: History, tmp_path: Path) -> None:
    before = ("model", "checkpoint", "scores")
    project = history.project.copy(tmp_path / "killed", without=before)
    killed_at(project, 60, kill_group)
    wait_for(lambda: not started_for(project.folder))  # trainer and server notice that their parent died

    def kill_all(process: subprocess.Popen[str]) -> None:
        for one in started_for(project.folder):
            one.kill()
        kill_group(process)

    killed_at(project, 150, kill_all)
    wait_for(lambda: not started_for(project.folder))
    result = project.distil("run", *SETTINGS)
    assert result.status == 0, result.err
    assert started_for(project.folder) == []

    other = history.project.copy(tmp_path / "other", without=before)
    assert weights(project) == undisturbed(other, run_folder_of(project) / "run.json", tmp_path)

    client = MlflowClient(project.mlflow)
    experiments = [one.experiment_id for one in client.search_experiments()]
    (train,) = client.search_runs(experiments, "tags.`distil.part` = 'train'")
    assert train.info.status == "FINISHED"
    for name in ("loss", "distil", "cosine", "mlm", "lr"):
        curve = client.get_metric_history(train.info.run_id, name)
        assert [metric.step for metric in curve] == list(range(1, STEPS + 1))
    assert len(client.search_model_versions("name = 'distilled'")) == 1
