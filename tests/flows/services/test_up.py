"""`distil up` with its real servers: its addresses, its refusals, its stop without left-over processes, its restart."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.pipeline.task_policy import GRACE_SECONDS
from flows.services import up
from flows.services.process import free_port
from flows.services.servers import live_up
from tasks.train.metrics import read_metrics
from tests.harness.processes import kill, started_for, wait_for
from tests.harness.servers.up import Up, flow_processes, request_json, running_up, start_up


def one_sentence(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """The only line of output of a refused `distil up`."""
    assert process.wait(60) == 1
    (sentence,) = (folder / "out").read_text(encoding="utf-8").splitlines()
    return sentence


def test_a_trainer_has_time_for_its_checkpoint() -> None:
    assert up.WORKER_SECONDS >= GRACE_SECONDS + 30


def endless(place: Path) -> Path:
    """The tiny recipe with a training that never ends and writes no checkpoint until it is stopped."""
    text = (place / "tiny.toml").read_text(encoding="utf-8")
    for name, value in (("max_steps", 40), ("checkpoint_steps", 20), ("validate_steps", 20)):
        text = text.replace(f"{name} = {value}", f"{name} = 1_000_000")
    path = place / "endless.toml"
    path.write_text(text.replace('name = "tiny"', 'name = "endless"'), encoding="utf-8")
    return path


def steps(home: Path, name: str = "endless") -> int:
    """The last step of the training of the recipe `name`, by its metrics; 0 before its first."""
    # Not parsed: a retry is rewriting run.json while this reads it.
    runs = (path for path in (home / "run").glob("*/run.json") if f'"name": "{name}"' in path.read_text())
    files = [run.with_name("metrics.jsonl") for run in runs]
    lines = [line for file in files if file.exists() for line in read_metrics(file)]
    return int(lines[-1]["step"]) if lines else 0


def checkpoints(home: Path) -> list[int]:
    """Steps of the checkpoints in the store."""
    found = [json.loads(path.read_text()) for path in (home / "store" / "receipts" / "checkpoint").glob("*.json")]
    return sorted(int(receipt["settings"]["step"]) for receipt in found)


def check_addresses(up: Up, home: Path) -> None:
    """The servers answer where up.json says, and both recipes are deployed."""
    assert live_up(str(home)) == {
        "pid": up.process.pid,
        "prefect_api": f"{up.prefect}/api",
        "prefect_ui": up.prefect,
        "mlflow": up.mlflow,
    }
    assert request_json(f"{up.prefect}/ui-settings")["api_url"] == f"{up.prefect}/api"
    assert {one["name"] for one in up.post("deployments/filter", {})} == {"tiny", "endless"}


def check_refusals(up: Up, environment: dict[str, str], recipe: Path, home: Path, other: Path) -> None:
    """A second `distil up` on the same home or port is refused in one sentence."""
    second = start_up(other, environment, str(recipe), "--home", str(home))
    assert f"another `distil up` serves {home}" in one_sentence(second, other)
    taken = start_up(other, environment, str(recipe), "--home", str(other), "--port", str(up.port))
    assert f"Prefect cannot use port {up.port} because it is taken" in one_sentence(taken, other)


def check_stopped(up: Up, home: Path) -> None:
    """No process is left, and both ports are free."""
    assert started_for(up.folder) == []
    assert live_up(str(home)) is None
    assert free_port("Prefect", up.port) == up.port
    assert free_port("MLflow", up.mlflow_port) == up.mlflow_port


@pytest.mark.guard
@pytest.mark.slow
def test_up_keeps_runs_and_trainings_over_ctrl_c_and_kill(
    place: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """A training saves a checkpoint at Ctrl-C; after a SIGKILL the next `distil up` marks its run Crashed."""
    recipes, folder = (place / "tiny.toml", endless(place)), tmp_path / "up"
    home = folder / "home"
    (home / "mlflow").mkdir(parents=True)
    local = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    earlier = local.create_run(local.create_experiment("by-a-plain-run"), run_name="earlier").info.run_id
    with running_up(folder, environment, *recipes) as first:
        check_addresses(first, home)
        found = request_json(f"{first.mlflow}/api/2.0/mlflow/runs/get?run_id={earlier}")
        assert found["run"]["info"]["run_name"] == "earlier"
        run = first.run_deployment("distill/endless")
        check_refusals(first, environment, recipes[0], home, tmp_path / "other")
        wait_for(lambda: steps(home) >= 20)
        assert checkpoints(home) == []
        assert first.stop(signal.SIGINT) == 0
        check_stopped(first, home)
    (saved,) = checkpoints(home)
    assert saved >= 20
    with running_up(folder, environment, *recipes) as second:
        assert second.state(run) == "Crashed"  # as the flow reported when it was stopped
        assert "lost its process" not in second.output
        second.post(f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}})
        wait_for(lambda: steps(home) >= saved + 20)
        assert second.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_for(lambda: not started_for(folder))
    with running_up(folder, environment, *recipes) as third:
        assert third.state(run) == "Crashed"
        assert third.stop(signal.SIGTERM) == 0
        check_stopped(third, home)


@pytest.mark.slow
def test_commands_use_its_servers_and_a_killed_worker_ends_it(
    place: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The flow and the trainer of the killed worker end too, after a checkpoint."""
    recipe, home = place / "tiny.toml", tmp_path / "home"
    with running_up(tmp_path, environment, recipe, endless(place)) as up:
        done = distil(environment, tmp_path, "run", str(recipe), f"home={home}", "train.max_steps=5")
        assert done.returncode == 0, done.stderr
        assert f"{up.mlflow}/#/experiments/" in done.stdout
        (made,) = [run for run in up.post("flow_runs/filter", {}) if run["name"] == "tiny"]
        assert made["state"]["name"] == "Completed"
        (link,) = [one for one in up.post("artifacts/filter", {}) if one["key"] == "mlflow-run"]
        assert up.mlflow in link["data"]

        finished = set(checkpoints(home))
        up.run_deployment("distill/endless")
        wait_for(lambda: steps(home, "endless") >= 20)
        assert flow_processes(tmp_path)
        (worker,) = [one for one in started_for(tmp_path) if one.cmdline()[1:3] == ["-m", "flows.services.worker"]]
        kill(worker.pid)
        assert up.process.wait(120) == 1
        assert f"worker ended with status 137, so all services were stopped; see {tmp_path}" in up.output
        assert started_for(tmp_path) == []
    assert max(set(checkpoints(home)) - finished) >= 20


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


def test_an_mlflow_server_of_the_user_is_refused(place: Path, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "up", "tiny.toml", "--home", str(tmp_path / "home")]
    team = environment | {"MLFLOW_TRACKING_URI": "http://me:secret@team:5000"}
    done = subprocess.run(command, cwd=place, env=team, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "MLFLOW_TRACKING_URI is http://team:5000, but `distil up` starts its own MLflow server" in done.stderr
    assert "secret" not in done.stderr
