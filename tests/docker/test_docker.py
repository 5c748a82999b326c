"""Checks docker/ without a Docker engine: linted, valid, secrets required, versions equal to the installed ones.

pytest tests/docker
"""

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
"""`${NAME:?why}`: compose refuses to start while NAME is unset or empty."""
VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|AUTH_KEY|TOKEN|CREDENTIAL|PRIVATE")
REGISTRY = re.compile(r"https?://(?!127\.0\.0\.1|(?:s3|prefect|mlflow):)|--index-url[= ](?!\$)", re.IGNORECASE)
"""An address outside this machine and the stack, or a package index in an option."""


@pytest.fixture(scope="module")
def folder(repo: Path) -> Path:
    return repo / "docker"


@pytest.fixture(scope="module")
def stack(folder: Path) -> dict[str, Any]:
    stack: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))
    return stack


def test_hadolint_finds_no_fault_in_the_dockerfile(folder: Path) -> None:
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    assert "hadolint ignore" not in text
    lint = _command("hadolint", "--no-color", "--failure-threshold", "style", str(folder / "Dockerfile"))
    assert (lint.returncode, lint.stdout) == (0, ""), lint.stdout


def test_compose_files_are_valid(folder: Path) -> None:
    files = sorted(map(str, folder.glob("compose*.yaml")))
    assert len(files) == 2
    check = _command("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_secret_is_required(folder: Path, stack: dict[str, Any]) -> None:
    """A variable whose name is that of a secret has the value `${NAME:?why}` and contains no secret itself."""
    found = dict(_secrets(stack))
    for where, value in found.items():
        assert REQUIRED.search(value), f"{where} starts without its secret"
    needed = {name for value in found.values() for name in REQUIRED.findall(value)}
    assert needed == {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY"}
    # Every other use of these variables is required too.
    used = VARIABLE.findall((folder / "compose.yaml").read_text(encoding="utf-8"))
    assert {name for name, rule in used if name in needed and not rule.startswith(":?")} == set()


def test_env_example_names_every_variable_and_contains_no_secret(folder: Path) -> None:
    lines = (folder / ".env.example").read_text(encoding="utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    text = (folder / "compose.yaml").read_text(encoding="utf-8")
    assert set(example) == {name for name, _ in VARIABLE.findall(text)}
    assert all(example[name] == "" for name in REQUIRED.findall(text))


@pytest.mark.parametrize("missing", ["POSTGRES_PASSWORD", "S3_SECRET_KEY"])
def test_compose_refuses_to_start_without_a_secret(folder: Path, tmp_path: Path, missing: str) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    names = set(REQUIRED.findall((folder / "compose.yaml").read_text(encoding="utf-8"))) - {missing}
    secrets = tmp_path / "secrets"
    secrets.write_text("".join(f"{name}=x\n" for name in names), encoding="utf-8")
    config = ["docker", "compose", "-f", str(folder / "compose.yaml"), "--env-file", str(secrets), "config", "-q"]
    incomplete = {name: value for name, value in os.environ.items() if name != missing}
    refused = subprocess.run(config, capture_output=True, text=True, env=incomplete, check=False)
    assert refused.returncode != 0
    assert missing in refused.stderr
    accepted = subprocess.run(config, capture_output=True, text=True, env=incomplete | {missing: "x"}, check=False)
    assert accepted.returncode == 0, accepted.stderr


def test_lock_has_the_versions_of_pyproject(repo: Path) -> None:
    """Direct dependencies and the transitive ones that pyproject pins because a newer version fails."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = dict(_pin(line) for line in project["dependencies"] + extras["s3"] + extras["postgres"])
    assert {"sqlalchemy", "fastapi", "flask-wtf"} <= set(pins)
    lock = _lock(repo)
    assert {name: lock.get(name) for name in pins} == pins


def test_lock_contains_all_dependencies_of_its_packages(repo: Path) -> None:
    """Dependencies of the packages that are installed in this environment."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    lock = _lock(repo)
    for name in lock:
        try:
            required = requires(name) or []
        except PackageNotFoundError:
            continue  # belongs to an extra that is not installed
        for line in map(Requirement, required):
            if line.marker is None or line.marker.evaluate({"extra": ""}):
                assert _plain(line.name) in lock, f"{name} requires {line.name}"


def test_no_file_contains_an_external_address(folder: Path) -> None:
    for path in folder.iterdir():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not REGISTRY.search(line), f"{path.name}:{number}: {line}"


def test_sources_of_the_image_exist_and_are_sent_to_the_builder(repo: Path, folder: Path) -> None:
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"flows", "tasks", "storage", "deployments"} < set(sources)
    allowed = (folder / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for name in sources:
        assert (repo / name).exists(), name
        assert f"!{name}" in allowed, f"{name} is copied, but not sent to the builder"


def test_prefect_and_mlflow_know_every_setting(folder: Path, stack: dict[str, Any]) -> None:
    """Prefect and MLflow ignore unknown variables, so a misspelled name would go unnoticed."""
    settings, variables = import_module("prefect.settings"), import_module("mlflow.environment_variables")
    server = import_module("mlflow.cli").server
    options = {str(item.envvar) for item in server.params if isinstance(item, click.Option) and item.envvar}
    in_image = re.findall(r"(?:ENV |^    )(\w+)=", (folder / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    names = set(in_image) | {name for _, service in _services(stack) for name in service.get("environment", {})}
    prefect = {name for name in names if name.startswith("PREFECT_")}
    mlflow = {name for name in names if name.startswith("MLFLOW_")}
    assert min(len(prefect), len(mlflow)) > 5
    assert {name for name in prefect if not hasattr(settings, name)} == set()
    assert {name for name in mlflow if name not in options and not hasattr(variables, name)} == set()


def test_only_the_mlflow_server_has_the_address_of_its_database(stack: dict[str, Any]) -> None:
    """The worker and `deploy` have the address of the server instead: without it they would open the database."""
    known = {
        name: {var for var in service.get("environment", {}) if var.startswith("MLFLOW_")}
        for name, service in _services(stack)
    }
    assert {name for name, names in known.items() if "MLFLOW_BACKEND_STORE_URI" in names} == {"mlflow"}
    assert {name for name, names in known.items() if "MLFLOW_TRACKING_URI" in names} == {"deploy", "worker"}


def test_ports_are_on_loopback_only(stack: dict[str, Any]) -> None:
    ports = [port for _, service in _services(stack) for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [name for name, service in _services(stack) if service.get("network_mode") == "host"]


def test_links_have_the_published_address_of_prefect(stack: dict[str, Any]) -> None:
    """Links in notifications of the server and links of the runs are opened in a browser outside the stack."""
    services = dict(_services(stack))
    (port,) = services["prefect"]["ports"]
    page = f"http://{port.removesuffix(':4200')}"
    for name in ("prefect", "deploy", "worker"):
        assert services[name]["environment"].get("PREFECT_UI_URL") == page, name
    assert services["prefect"]["environment"]["PREFECT_SERVER_UI_API_URL"] == f"{page}/api"


def test_images_are_pinned(folder: Path, stack: dict[str, Any]) -> None:
    base = re.findall(r"^FROM (\S+)", (folder / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    foreign = [service["image"] for _, service in _services(stack) if not service["image"].startswith("distil:")]
    assert len(foreign) == 2
    for image in base + foreign:
        assert re.search(r":\d+\.\d+", image), f"{image} is not pinned to a version"


def test_services_are_read_only_and_unprivileged(stack: dict[str, Any]) -> None:
    for name, service in _services(stack):
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_services_start_after_health_checks_and_the_worker_has_time_to_stop(stack: dict[str, Any]) -> None:
    services = dict(_services(stack))
    for name, service in services.items():
        for other, rule in service.get("depends_on", {}).items():
            done = rule["condition"] == "service_completed_successfully"
            assert done or rule["condition"] == "service_healthy", name
            # The health check of the worker is in its image.
            assert done or "test" in services[other]["healthcheck"], f"{name} waits for the health of {other}"
    assert services["worker"]["depends_on"]["deploy"]["condition"] == "service_completed_successfully"
    assert services["worker"]["stop_grace_period"] == "90s"


def _services(stack: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from stack["services"].items()


def _secrets(stack: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (SERVICE.VARIABLE, value) of all variables whose names are those of secrets."""
    for name, service in _services(stack):
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                yield f"{name}.{variable}", str(value)


def _lock(repo: Path) -> dict[str, str]:
    lines = (repo / "docker" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(_pin(line) for line in lines if not line.startswith("#"))


def _pin(line: str) -> tuple[str, str]:
    name, version = line.split("==")
    return _plain(name), version


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _command(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command of this environment, else of the machine."""
    installed = Path(sys.executable).with_name(name)
    program = str(installed) if installed.exists() else shutil.which(name)
    assert program, f"{name} is not installed: pip install -e '.[test]'"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
