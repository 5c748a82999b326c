"""docker/ as far as it can be judged without an engine: linted, valid, refusing, and true to what is installed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

REQUIRED = re.compile(r"\$\{(\w+):\?[^}]+\}")
"""`${NAME:?why}`: nothing starts while NAME is unset or empty."""
VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|AUTH_KEY|TOKEN|CREDENTIAL|PRIVATE")
REGISTRY = re.compile(r"https?://(?!127\.0\.0\.1|(?:s3|prefect|mlflow):)|--index-url[= ](?!\$)", re.IGNORECASE)
"""An address that is neither this machine's nor one of the stack's own."""


@pytest.fixture(scope="module")
def folder(repo: Path) -> Path:
    return repo / "docker"


@pytest.fixture(scope="module")
def stack(folder: Path) -> dict[str, Any]:
    stack: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))
    return stack


def test_hadolint_has_nothing_to_say(folder: Path) -> None:
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    assert "hadolint ignore" not in text
    lint = _command("hadolint", "--no-color", "--failure-threshold", "style", str(folder / "Dockerfile"))
    assert (lint.returncode, lint.stdout) == (0, ""), lint.stdout


def test_compose_files_are_valid(folder: Path) -> None:
    files = sorted(map(str, folder.glob("compose*.yaml")))
    assert len(files) == 2
    check = _command("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)
    assert check.returncode == 0, check.stdout + check.stderr


def test_each_secret_is_required(folder: Path, stack: dict[str, Any]) -> None:
    """A value whose name is that of a secret holds `${NAME:?}` and no secret of its own."""
    found = dict(_secrets(stack))
    for where, value in found.items():
        assert REQUIRED.search(value), f"{where} starts without its secret"
    needed = {name for value in found.values() for name in REQUIRED.findall(value)}
    assert needed == {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY"}
    # Nowhere else may one of them be used without the question mark.
    used = VARIABLE.findall((folder / "compose.yaml").read_text(encoding="utf-8"))
    assert {name for name, rule in used if name in needed and not rule.startswith(":?")} == set()


def test_example_names_every_variable_and_no_secret(folder: Path) -> None:
    lines = (folder / ".env.example").read_text(encoding="utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    text = (folder / "compose.yaml").read_text(encoding="utf-8")
    assert set(example) == {name for name, _ in VARIABLE.findall(text)}
    assert all(example[name] == "" for name in REQUIRED.findall(text))


@pytest.mark.parametrize("lacking", ["POSTGRES_PASSWORD", "S3_SECRET_KEY"])
def test_compose_refuses_to_start_without_a_secret(folder: Path, tmp_path: Path, lacking: str) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    names = set(REQUIRED.findall((folder / "compose.yaml").read_text(encoding="utf-8"))) - {lacking}
    secrets = tmp_path / "secrets"
    secrets.write_text("".join(f"{name}=x\n" for name in names), encoding="utf-8")
    config = ["docker", "compose", "-f", str(folder / "compose.yaml"), "--env-file", str(secrets), "config", "-q"]
    bare = {name: value for name, value in os.environ.items() if name != lacking}
    refused = subprocess.run(config, capture_output=True, text=True, env=bare, check=False)
    assert refused.returncode != 0
    assert lacking in refused.stderr
    whole = subprocess.run(config, capture_output=True, text=True, env=bare | {lacking: "x"}, check=False)
    assert whole.returncode == 0, whole.stderr


def test_lock_has_what_pyproject_pins(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    direct = dict(_pin(line) for line in project["dependencies"] + extras["s3"] + extras["postgres"])
    lock = _lock(repo)
    assert {name: lock.get(name) for name in direct} == direct


def test_lock_is_closed(repo: Path) -> None:
    """Whatever a locked package asks for in this environment is locked too."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    lock = _lock(repo)
    for name in lock:
        try:
            asked = requires(name) or []
        except PackageNotFoundError:
            continue  # an extra that is not installed here
        for line in map(Requirement, asked):
            if line.marker is None or line.marker.evaluate({"extra": ""}):
                assert _plain(line.name) in lock, f"{name} asks for {line.name}"


def test_no_registry_address(folder: Path) -> None:
    for path in folder.iterdir():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not REGISTRY.search(line), f"{path.name}:{number}: {line}"


def test_what_the_image_copies_is_there(repo: Path, folder: Path) -> None:
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"flows", "tasks", "storage", "deployments"} < set(sources)
    allowed = (folder / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for name in sources:
        assert (repo / name).exists(), name
        assert f"!{name}" in allowed, f"{name} is copied, but not sent to the builder"


def test_settings_exist(folder: Path, stack: dict[str, Any]) -> None:
    """Prefect and MLflow pass over a variable that they do not know, so a typing error would stay unseen."""
    settings, variables = import_module("prefect.settings"), import_module("mlflow.environment_variables")
    server = import_module("mlflow.cli").server
    options = {str(item.envvar) for item in server.params if isinstance(item, click.Option) and item.envvar}
    in_image = re.findall(r"(?:ENV |^    )(\w+)=", (folder / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    names = set(in_image) | {name for _, one in _services(stack) for name in one.get("environment", {})}
    prefect = {name for name in names if name.startswith("PREFECT_")}
    mlflow = {name for name in names if name.startswith("MLFLOW_")}
    assert min(len(prefect), len(mlflow)) > 5
    assert {name for name in prefect if not hasattr(settings, name)} == set()
    assert {name for name in mlflow if name not in options and not hasattr(variables, name)} == set()


def test_only_the_server_sees_mlflow_s_database(stack: dict[str, Any]) -> None:
    """Who runs recipes has the server's address: our commands would take the database where they know of no server."""
    known = {
        name: {var for var in one.get("environment", {}) if var.startswith("MLFLOW_")} for name, one in _services(stack)
    }
    assert {name for name, names in known.items() if "MLFLOW_BACKEND_STORE_URI" in names} == {"mlflow"}
    assert {name for name, names in known.items() if "MLFLOW_TRACKING_URI" in names} == {"deploy", "worker"}


def test_ports_are_on_loopback_only(stack: dict[str, Any]) -> None:
    ports = [port for _, one in _services(stack) for port in one.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [name for name, one in _services(stack) if one.get("network_mode") == "host"]


def test_links_lead_to_where_a_browser_outside_finds_prefect(stack: dict[str, Any]) -> None:
    """The server's, in what its automations send, and those of the runs."""
    services = dict(_services(stack))
    (port,) = services["prefect"]["ports"]
    page = f"http://{port.removesuffix(':4200')}"
    for name in ("prefect", "deploy", "worker"):
        assert services[name]["environment"].get("PREFECT_UI_URL") == page, name
    assert services["prefect"]["environment"]["PREFECT_SERVER_UI_API_URL"] == f"{page}/api"


def test_images_are_pinned(folder: Path, stack: dict[str, Any]) -> None:
    base = re.findall(r"^FROM (\S+)", (folder / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    foreign = [one["image"] for _, one in _services(stack) if not one["image"].startswith("distil:")]
    assert len(foreign) == 2
    for image in base + foreign:
        assert re.search(r":\d+\.\d+", image), f"{image} is not pinned to a version"


def test_services_have_no_more_rights_than_they_need(stack: dict[str, Any]) -> None:
    for name, one in _services(stack):
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert not one.get("privileged"), name


def test_services_start_by_health_and_have_time_to_stop(stack: dict[str, Any]) -> None:
    services = dict(_services(stack))
    for name, one in services.items():
        for other, rule in one.get("depends_on", {}).items():
            done = rule["condition"] == "service_completed_successfully"
            assert done or rule["condition"] == "service_healthy", name
            # The worker's check is in its image.
            assert done or "test" in services[other]["healthcheck"], f"{name} waits for the health of {other}"
    assert services["worker"]["depends_on"]["deploy"]["condition"] == "service_completed_successfully"
    assert services["worker"]["stop_grace_period"] == "90s"


def _services(stack: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from stack["services"].items()


def _secrets(stack: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for service, one in _services(stack):
        for name, value in one.get("environment", {}).items():
            if SECRET.search(name):
                yield f"{service}.{name}", str(value)


def _lock(repo: Path) -> dict[str, str]:
    lines = (repo / "docker" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(_pin(line) for line in lines if not line.startswith("#"))


def _pin(line: str) -> tuple[str, str]:
    name, version = line.split("==")
    return _plain(name), version


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _command(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of this environment, else of the machine."""
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    assert program, f"{name} is not installed: pip install -e '.[test]'"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
