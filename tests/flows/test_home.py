"""Addresses as people see them."""

import pytest

from flows.home import public


def test_an_address_is_shown_without_its_password() -> None:
    assert public("https://me:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"


def test_a_server_is_shown_where_browsers_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTIL_MLFLOW_URL", "http://127.0.0.1:5000")
    assert public("http://me:secret@mlflow:5000") == "http://127.0.0.1:5000"
    assert public("sqlite:////home/me/mlflow.db") == "sqlite:////home/me/mlflow.db"
