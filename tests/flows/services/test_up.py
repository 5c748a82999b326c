"""`distil up` with its real servers: what it starts, what it leaves behind (nothing), what it keeps (everything)."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.pipeline import trainer_process as launch
from flows.services import up
from flows.services.process import free_port
from flows.services.servers import live_up
from tasks.train.metrics import read_metrics
from tests.harness.up import Up, ask, flow_processes, kill, launched, left, running, wait_for

FLOW = {"name": "earlier"}


def one_sentence(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """What a refused `distil up` says."""
    assert process.wait(60) == 1
    (sentence,) = (folder / "out").read_text(encoding="utf-8").splitlines()
    return sentence


def names(served: Up) -> set[str]:
    return {run["name"] for run in served.post("flow_runs/filter", {})}


@pytest.mark.slow
def test_up_ctrl_c_and_up_again(place: Path, environment: dict[str, str], tmp_path: Path) -> None:
    recipe = place / "tiny.toml"
    home = tmp_path / "up" / "home"
    (home / "mlflow").mkdir(parents=True)
    local = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    mine = local.create_run(local.create_experiment("by-a-plain-run"), run_name="earlier").info.run_id
    with running(tmp_path / "up", environment, recipe) as first:
        here = f"http://127.0.0.1:{first.port}"
        assert live_up(str(home)) == {
            "pid": first.process.pid,
            "prefect_api": f"{here}/api",
            "prefect_ui": here,
            "mlflow": first.mlflow,
        }
        assert ask(f"{here}/ui-settings")["api_url"] == f"{here}/api"
        assert {one["name"] for one in first.post("deployments/filter", {})} == {"tiny"}
        assert ask(f"{first.mlflow}/api/2.0/mlflow/runs/get?run_id={mine}")["run"]["info"]["run_name"] == "earlier"
        flow = first.post("flows/", FLOW)["id"]
        first.post("flow_runs/", {"flow_id": flow, "name": "earlier", "state": {"type": "COMPLETED"}})
        other = tmp_path / "other"
        second = launched(other, environment, str(recipe), "--home", str(home))
        assert f"another `distil up` serves {home}" in one_sentence(second, other)
        taken = launched(other, environment, str(recipe), "--home", str(other), "--port", str(first.port))
        assert f"port {first.port} is taken, so Prefect cannot have it" in one_sentence(taken, other)
        assert first.stop(signal.SIGINT) == 0
        assert left(tmp_path / "up") == []
        assert live_up(str(home)) is None
        assert free_port("Prefect", first.port) == first.port
        assert free_port("MLflow", first.mlflow_port) == first.mlflow_port
    with running(tmp_path / "up", environment, recipe) as again:
        assert "earlier" in names(again)
        assert again.stop(signal.SIGTERM) == 0
        assert left(tmp_path / "up") == []


def test_a_trainer_has_time_for_its_checkpoint() -> None:
    assert up.WORKER_SECONDS >= launch.GRACE_SECONDS + 30


def endless(place: Path) -> Path:
    """The tiny recipe with a training that never ends by itself and never saves by itself."""
    text = (place / "tiny.toml").read_text(encoding="utf-8")
    for name, value in (("max_steps", 40), ("checkpoint_steps", 20), ("validate_steps", 20)):
        text = text.replace(f"{name} = {value}", f"{name} = 1_000_000")
    path = place / "endless.toml"
    path.write_text(text.replace('name = "tiny"', 'name = "endless"'), encoding="utf-8")
    return path


def steps(home: Path) -> int:
    """How far the training got, by its own metrics."""
    files = list((home / "run").glob("*/metrics.jsonl"))
    lines = read_metrics(files[0]) if files else []
    return int(lines[-1]["step"]) if lines else 0


def checkpoints(home: Path) -> list[int]:
    """Steps of the checkpoints in the store."""
    found = [json.loads(path.read_text()) for path in (home / "store" / "receipts" / "checkpoint").glob("*.json")]
    return sorted(int(receipt["settings"]["step"]) for receipt in found)


@pytest.mark.slow
def test_a_training_saves_at_ctrl_c_and_is_marked_after_a_kill(
    place: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe, home = endless(place), tmp_path / "home"
    with running(tmp_path, environment, recipe) as first:
        run = first.run_deployment("distill/endless")
        wait_for(lambda: steps(home) >= 20)
        assert checkpoints(home) == []
        assert first.stop(signal.SIGINT) == 0
        assert left(tmp_path) == []
    (saved,) = checkpoints(home)
    assert saved >= 20
    with running(tmp_path, environment, recipe) as second:
        assert second.state(run) == "Crashed"  # it said so itself
        assert "left behind" not in second.said
        second.post(f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}})
        wait_for(lambda: steps(home) >= saved + 20)
        assert second.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_for(lambda: not left(tmp_path))
    with running(tmp_path, environment, recipe) as third:
        assert third.state(run) == "Crashed"
        assert third.stop(signal.SIGINT) == 0


@pytest.mark.slow
def test_commands_use_it_and_it_ends_when_a_part_dies(place: Path, environment: dict[str, str], tmp_path: Path) -> None:
    recipe = place / "tiny.toml"
    with running(tmp_path, environment, recipe) as served:
        command = ["run", str(recipe), f"home={tmp_path / 'home'}", "train.max_steps=5"]
        done = distil(environment, tmp_path, *command)
        assert done.returncode == 0, done.stderr
        assert f"{served.mlflow}/#/experiments/" in done.stdout
        (made,) = [run for run in served.post("flow_runs/filter", {}) if run["name"] == "tiny"]
        assert made["state"]["name"] == "Completed"
        (link,) = [one for one in served.post("artifacts/filter", {}) if one["key"] == "mlflow-run"]
        assert served.mlflow in link["data"]
        (worker,) = [one for one in left(tmp_path) if one.cmdline()[1:3] == ["-m", "flows.services.worker"]]
        kill(worker)
        assert served.process.wait(60) == 1
        assert f"worker ended by itself with status 137, so all was stopped; see {tmp_path}" in served.said
        assert left(tmp_path) == []


@pytest.mark.slow
def test_a_killed_worker_takes_its_flow_and_trainer_along(
    place: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe, home = endless(place), tmp_path / "home"
    with running(tmp_path, environment, recipe) as first:
        run = first.run_deployment("distill/endless")
        wait_for(lambda: steps(home) >= 20)
        assert flow_processes(tmp_path)
        (worker,) = [one for one in left(tmp_path) if one.cmdline()[1:3] == ["-m", "flows.services.worker"]]
        kill(worker)
        assert first.process.wait(120) == 1
        assert left(tmp_path) == []
    assert checkpoints(home)[-1] >= 20
    with running(tmp_path, environment, recipe) as second:
        assert second.state(run) == "Crashed"


def distil(environment: dict[str, str], folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A `distil` command in another terminal."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_an_mlflow_that_the_user_named_is_not_passed_over(
    place: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "flows.cli", "up", "tiny.toml", "--home", str(tmp_path / "home")]
    team = environment | {"MLFLOW_TRACKING_URI": "http://me:secret@team:5000"}
    done = subprocess.run(command, cwd=place, env=team, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "MLFLOW_TRACKING_URI is http://team:5000, but `distil up` serves an MLflow of its own" in done.stderr
    assert "secret" not in done.stderr
