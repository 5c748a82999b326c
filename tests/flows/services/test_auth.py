"""Authentication of both servers: wrong credentials are refused, and no file or record contains a password."""

import base64
import json
import stat
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from flows.services.auth import mlflow_access, prefect_access
from storage.errors import FatalError
from tests.harness.processes import wait_for
from tests.harness.servers.up import Up, request_json, running_up

AUTH = "teller:Camembert-au-lait-cru-7"
NAME, PASSWORD = "keeper", "Roquefort-affine-en-cave-9"


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_passwords_the_servers_are_open(nothing_set: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert prefect_access() == {}
    assert mlflow_access(str(tmp_path)) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "password", "message"),
    [
        (NAME, "", "MLFLOW_TRACKING_PASSWORD is not set"),
        ("", PASSWORD, "MLFLOW_TRACKING_USERNAME is not set"),
        (NAME, "Brie-12-34.", "MLFLOW_TRACKING_PASSWORD is too short"),
    ],
)
def test_half_a_login_and_a_short_password_are_refused(
    nothing_set: pytest.MonkeyPatch, tmp_path: Path, name: str, password: str, message: str
) -> None:
    nothing_set.setenv("MLFLOW_TRACKING_USERNAME", name)
    nothing_set.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(FatalError, match=message) as refused:
        mlflow_access(str(tmp_path))
    assert not password or password not in str(refused.value)


def test_the_servers_get_the_credentials_and_their_files_are_private(
    nothing_set: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_set.setenv("PREFECT_API_AUTH_STRING", AUTH)
    nothing_set.setenv("MLFLOW_TRACKING_USERNAME", NAME)
    nothing_set.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert prefect_access() == {"PREFECT_SERVER_API_AUTH_STRING": AUTH}
    access = mlflow_access(str(tmp_path))
    assert (access["MLFLOW_AUTH_ADMIN_USERNAME"], access["MLFLOW_AUTH_ADMIN_PASSWORD"]) == (NAME, PASSWORD)
    files = list((tmp_path / "mlflow").iterdir())
    assert len(files) == 3
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert PASSWORD not in file.read_text(encoding="utf-8")
    assert str(tmp_path / "mlflow" / "auth.db") in Path(access["MLFLOW_AUTH_CONFIG_PATH"]).read_text(encoding="utf-8")
    again = mlflow_access(str(tmp_path))["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    assert again == access["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    assert mlflow_access(str(tmp_path / "other"))["MLFLOW_FLASK_SERVER_SECRET_KEY"] != again


def basic(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def refused(url: str, body: dict[str, object] | None, headers: dict[str, str]) -> bool:
    """True if the server answers 401."""
    try:
        request_json(url, body, headers)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    return False


def everything_recorded(up: Up) -> str:
    """Parameters, logs, artifacts and tags of all runs, as both servers give them."""
    header = basic(AUTH)
    prefect = [
        up.post(f"{kind}/filter", {}, header) for kind in ("flow_runs", "task_runs", "logs", "artifacts", "deployments")
    ]
    assert all(prefect)
    login = basic(f"{NAME}:{PASSWORD}")
    api = f"{up.mlflow}/api/2.0/mlflow"
    experiments = request_json(f"{api}/experiments/search?max_results=100", None, login)["experiments"]
    runs = request_json(f"{api}/runs/search", {"experiment_ids": [one["experiment_id"] for one in experiments]}, login)
    versions = request_json(f"{api}/model-versions/search", None, login)
    assert runs["runs"]
    assert versions["model_versions"]
    return json.dumps([prefect, runs, versions])


def holding(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder with any of these in their bytes."""
    wanted = [form.encode() for secret in secrets for form in (secret, basic(secret)["Authorization"][6:])]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in wanted)]


@pytest.mark.guard
@pytest.mark.slow
def test_a_complete_run_with_both_passwords(place: Path, environment: dict[str, str], tmp_path: Path) -> None:
    secret = environment | {
        "PREFECT_API_AUTH_STRING": AUTH,
        "MLFLOW_TRACKING_USERNAME": NAME,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    }
    recipe = place / "tiny.toml"
    with running_up(tmp_path, secret, recipe) as up:
        api, search = f"http://127.0.0.1:{up.port}/api", f"{up.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        for headers in ({}, basic("teller:wrong"), basic(f"{NAME}:wrong-wrong-wrong")):
            assert refused(f"{api}/flow_runs/filter", {}, headers)
            assert refused(search, None, headers)
        run = up.run_deployment("distill/tiny", basic(AUTH))
        wait_for(lambda: up.state(run, basic(AUTH)) in ("Completed", "Failed", "Crashed"))
        assert up.state(run, basic(AUTH)) == "Completed"
        model = str(place / "teacher")
        mine = f"home={tmp_path / 'home'}"
        for arguments in (["prepare", recipe, mine], ["score", model, recipe, mine], ["run", recipe, mine]):
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli", *map(str, arguments)],
                cwd=tmp_path,
                env=secret,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert PASSWORD not in done.stdout + done.stderr
            assert AUTH not in done.stdout + done.stderr
        records = everything_recorded(up)
        assert PASSWORD not in records
        assert AUTH not in records
        assert holding(tmp_path, AUTH, PASSWORD, f"{NAME}:{PASSWORD}") == []
        assert PASSWORD in (Path("/proc") / str(up.process.pid) / "environ").read_text(encoding="utf-8")
    assert holding(tmp_path, AUTH, PASSWORD, f"{NAME}:{PASSWORD}") == []
    wrong = secret | {"MLFLOW_TRACKING_PASSWORD": "Munster-affine-en-cave-9"}
    with pytest.raises(AssertionError, match="it has those of its first start"), running_up(tmp_path, wrong, recipe):
        pass
