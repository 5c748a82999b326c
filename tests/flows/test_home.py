"""Addresses that users see, MLflow that commands use, proxies, user names."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from flows.home import registry_name, set_environment, tracking_uri, up_file, user, without_credentials
from flows.services.process import is_healthy
from tasks.recipe.config import Recipe
from tests.harness.recipe_values import simple_recipe


def test_an_address_is_shown_without_its_password() -> None:
    assert without_credentials("https://me:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"


def test_a_server_is_shown_where_browsers_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTIL_MLFLOW_URL", "http://127.0.0.1:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    assert without_credentials("http://me:secret@other:5000") == "http://other:5000"
    assert without_credentials("http://me:secret@mlflow:5000") == "http://127.0.0.1:5000"
    assert without_credentials("sqlite:////home/me/mlflow.db") == "sqlite:////home/me/mlflow.db"


def recipe_of(home: Path) -> Recipe:
    return simple_recipe(home=str(home))


def test_every_command_uses_the_database_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(recipe) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://me:secret@db/mlflow")
    assert tracking_uri(recipe) == "postgresql+psycopg2://me:secret@db/mlflow"
    assert registry_name(recipe) == "postgresql+psycopg2://db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(recipe) == registry_name(recipe) == "http://mlflow:5000"


def test_the_registry_of_a_home_has_one_name_with_and_without_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = recipe_of(tmp_path)
    alone = registry_name(recipe)
    up_file(recipe.home).parent.mkdir()
    up_file(recipe.home).write_text(json.dumps({"mlflow": "http://127.0.0.1:5001"}), encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001")
    assert registry_name(recipe) == alone
    assert registry_name(recipe_of(tmp_path / "other")) != alone


def test_the_servers_of_this_machine_are_reached_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ".example"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("urllib.request._opener", None)  # it caches the proxies of its first call
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/health"
        assert not is_healthy(url)
        for name in dict(os.environ):  # so that its changes end with the test
            monkeypatch.setenv(name, os.environ[name])
        set_environment(str(tmp_path))
        assert is_healthy(url)
        server.shutdown()
        thread.join()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == ".example,127.0.0.1,localhost"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert user() == f"user {os.getuid()}"
