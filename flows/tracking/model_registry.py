"""Reads and writes MLflow's model registry: versions of a model, their tags, aliases `challenger` and `champion`.

    registry = open_registry(recipe)
    version = registry.register(run_id, name, model_key, folder, ...)     # once per model key; alias `challenger`
    registry.version_at("models:/NAME@ALIAS"), registry.version("NAME", "3"), registry.champion("NAME")
    registry.set_champion(version, when, expected)          # flows/promote.py decides which version

The runs that log the models are in flows/tracking/mlflow_runs.py.
"""

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema

from flows.home import REGISTERED, tracking_uri, without_credentials
from flows.tracking.mlflow_errors import translate_errors
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.recipe.config import Recipe

CHALLENGER = "challenger"

CHAMPION = "champion"

ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's error codes for a model, alias or version that does not exist or whose name is invalid."""

CHAMPION_SINCE = "distil.champion_since"
"""Tag of every current or past champion with the time (UTC) at which it became champion."""

HALF_REGISTERED = "distil.half_registered"
"""Tag of a version whose registration is incomplete because its alias `challenger` is not set yet.

Without the tag, a repeated registration would move the alias back from a newer version."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    model_id: str = field(default="", compare=False)
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def uri(self) -> str:
        """The URI that `mlflow.transformers.load_model` accepts."""
        return f"models:/{self.name}/{self.version}"

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class ModelRegistry:
    """The registered models of one MLflow."""

    client: MlflowClient

    @translate_errors()
    def register(
        self,
        run_id: str,
        name: str,
        model_key: str,
        folder: Path,
        example: str,
        tags: Mapping[str, str],
        trust_remote_code: bool = False,
    ) -> Version:
        """Registers a model folder once per model key; returns its version, which gets the alias `challenger`.

        `example` is a sentence with `<mask>`. A repeated call completes an interrupted registration.
        """
        known = self.version_of(name, model_key)
        if known is None:
            logged = _log_model(self.client, run_id, folder, example, trust_remote_code)
            if not any(model.name == name for model in self.client.search_registered_models(f"name = '{name}'")):
                self.client.create_registered_model(name)
            version_tags = {key: value for key, value in tags.items() if value}
            version_tags |= {"distil.model_key": model_key, HALF_REGISTERED: "its alias is still to be set"}
            created = self.client.create_model_version(
                name,
                logged.model_uri,
                run_id=run_id,
                tags=version_tags,
                model_id=logged.model_id,  # required by a server, optional with a database
            )
            known = _version(created)
        if HALF_REGISTERED in known.tags:  # new, or left over from a process that was killed at this point
            self.client.set_registered_model_alias(name, CHALLENGER, known.version)
            self.tag_version(known, {HALF_REGISTERED: ""})
            known = self.version(name, known.version)
        return known

    @translate_errors()
    def version_of(self, name: str, model_key: str) -> Version | None:
        """Returns the version with this model key, or None."""
        query = f"name = '{name}' and tags.`distil.model_key` = '{model_key}'"
        for found in self.client.search_model_versions(query, max_results=1):
            return _version(found)
        return None

    @translate_errors()
    def version(self, name: str, version: str = "") -> Version:
        """Returns the version with this number, or the challenger for "". FatalError if it does not exist."""
        try:
            number = version or self._aliases(name).get(CHALLENGER, "")
            if not number:
                raise FatalError(f"model {name} has no {CHALLENGER}; select a version with --version")
            return _version(self.client.get_model_version(name, number))
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            what = f"version {version} of model {name}" if version else f"model {name}"
            raise FatalError(
                f"MLflow has no {what}; use the recipe that registers the model, and a --version that MLflow lists"
            ) from error

    @translate_errors()
    def version_at(self, uri: str) -> Version:
        """Returns the version of a URI models:/NAME/NUMBER or models:/NAME@ALIAS. FatalError if it does not exist."""
        return _version(_find(self.client, uri))

    @translate_errors()
    def champion(self, name: str) -> Version | None:
        """Returns the version with the alias `champion`, or None."""
        number = self._aliases(name).get(CHAMPION)
        return _version(self.client.get_model_version(name, number)) if number else None

    @translate_errors()
    def champions(self, name: str) -> list[Version]:
        """Returns the past champions, oldest first, followed by the current one."""
        now = self.champion(name)
        found, token = [], None
        while True:
            page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [_version(one) for one in page]
            token = page.token
            if not token:
                break
        past = [one for one in found if CHAMPION_SINCE in one.tags and one != now]
        return sorted(past, key=lambda one: one.tags[CHAMPION_SINCE]) + ([now] if now else [])

    @translate_errors()
    def aliases_of(self, version: Version) -> list[str]:
        """Returns the current aliases of the version, sorted. A newer version may have taken over `challenger`."""
        return sorted(alias for alias, number in self._aliases(version.name).items() if number == version.version)

    @translate_errors()
    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Sets tags of a version. An empty value removes the tag."""
        for name, value in tags.items():
            if value:
                self.client.set_model_version_tag(version.name, version.version, name, value)
            elif name in version.tags:
                self.client.delete_model_version_tag(version.name, version.version, name)

    @translate_errors()
    def set_champion(self, version: Version, when: str, expected: Version | None) -> None:
        """Moves the alias `champion` to this version. `when` is the current time in UTC.

        RetryableError if the champion is not the `expected` version, or changes during the call.
        """
        before = self.champion(version.name)
        if before != expected:
            raise RetryableError(
                f"another process changed the champion of {version.name} during the gate's decision; try again"
            )
        if before and before != version and CHAMPION_SINCE not in before.tags:
            self.tag_version(before, {CHAMPION_SINCE: when})  # a user set the alias in MLflow
        self.client.set_registered_model_alias(version.name, CHAMPION, version.version)
        if self.champion(version.name) != version:
            raise RetryableError(f"another process changed the champion of {version.name} at the same time; try again")
        self.tag_version(version, {CHAMPION_SINCE: when})

    def _aliases(self, name: str) -> dict[str, str]:
        return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}


def open_registry(recipe: Recipe) -> ModelRegistry:
    """Opens the registry of the recipe's MLflow."""
    return ModelRegistry(connect(recipe)[0])


@translate_errors()
def connect(recipe: Recipe) -> tuple[MlflowClient, str]:
    """Returns a client of the recipe's MLflow, and its URI. Creates the folder of a local database.

    FatalError: the driver of the database is not installed. RetryableError: the database does not respond.
    """
    uri = tracking_uri(recipe)
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    try:
        return MlflowClient(uri), uri
    except ModuleNotFoundError as error:
        raise FatalError(
            f"MLflow's database {without_credentials(uri)} requires the Python package {error.name}; install it (for "
            "PostgreSQL with `pip install -e '.[postgres]'`)"
        ) from error


@translate_errors()
def fetch_model(recipe: Recipe, uri: str) -> Path:
    """Downloads a registered model and returns its folder, which AutoModel and AutoTokenizer can load.

    `uri` is models:/NAME@ALIAS or models:/NAME/VERSION. The folder is cached below the recipe's home. FatalError if the
    model does not exist.
    """
    client, server = connect(recipe)
    found = _find(client, uri)
    # The key contains the creation time because version numbers start at 1 again in a new database.
    cache_key = sha256_bytes(canonical_json([server, found.name, str(found.version), found.creation_timestamp]))
    folder = Path(recipe.home) / "cache" / "registered" / cache_key[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        exact = f"{REGISTERED}{found.name}/{found.version}"
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as fresh:
            copy = mlflow.artifacts.download_artifacts(exact, dst_path=f"{fresh}/whole")
            # Renamed once complete. If another process was faster, its copy is identical.
            with suppress(OSError):
                Path(copy).rename(folder)
    return folder / "model"


@translate_errors()
def champion_of(recipe: Recipe) -> Version | None:
    """Returns the champion of the recipe's registered model, or None."""
    client, _ = connect(recipe)
    try:
        return _version(_find(client, f"{REGISTERED}{recipe.register_as.name}@{CHAMPION}"))
    except FatalError:
        return None


def _find(client: MlflowClient, uri: str) -> ModelVersion:
    """Returns the version with a models:/ URI. FatalError if it does not exist."""
    name, at, alias = uri.removeprefix(REGISTERED).partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = name.rpartition("/")
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise FatalError(
            f"MLflow has no registered model {uri}; correct the name (models:/NAME@ALIAS or models:/NAME/VERSION), or "
            "register the model with `distil run`",
            uri,
        ) from error


def _version(found: ModelVersion) -> Version:
    # The registry does not return the id of the logged model, but the source of the version contains it: models:/m-...
    source = found.source or ""
    logged = source.removeprefix(REGISTERED) if source.startswith(f"{REGISTERED}m-") else ""
    return Version(found.name, str(found.version), found.run_id or "", logged, dict(found.tags))


def _log_model(client: MlflowClient, run_id: str, folder: Path, example: str, trust_remote_code: bool) -> ModelInfo:
    """Logs the model folder in MLflow's transformers flavour.

    MLflow stores the tokenizer in a different folder from the weights. The tokenizer's files are therefore also copied
    to `model/`, so that AutoModel and AutoTokenizer can load that folder.
    """
    import transformers

    text = Schema([ColSpec(DataType.string)])
    model = transformers.pipeline("fill-mask", model=str(folder), device="cpu", trust_remote_code=trust_remote_code)
    mask = str(model.tokenizer.mask_token) if model.tokenizer else "<mask>"
    with mlflow.start_run(run_id=run_id):
        info: ModelInfo = mlflow.transformers.log_model(
            model,
            name="model",
            signature=ModelSignature(inputs=text, outputs=text),
            input_example=example.replace("<mask>", mask),
            # Without explicit requirements MLflow loads the model in another process to infer them.
            pip_requirements=[f"transformers=={transformers.__version__}", "torch"],
        )
    with tempfile.TemporaryDirectory() as extra:
        shutil.copytree(folder, Path(extra) / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        client.log_model_artifacts(info.model_id, extra)
    return info
