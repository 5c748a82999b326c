"""MLflow's model registry: versions of a model, their tags, and the aliases `challenger` and `champion`.

    registry = open_registry(recipe)
    version = registry.register(run_id, name, model_key, folder, ...)     # one per model key, alias `challenger`
    registry.named("models:/NAME@ALIAS"), registry.version("NAME", "3"), registry.champion("NAME")
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
"""MLflow's error codes for a model, alias or version that does not exist or has an invalid name."""

CHAMPION_SINCE = "distil.champion_since"
"""Tag of every present or past champion: the time (UTC) at which it became champion."""

HALF_REGISTERED = "distil.half_registered"
"""Tag of a version whose registration is incomplete: it has not received the alias `challenger` yet.

Without the tag a repeated registration would move the alias back from a newer version."""


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
        """Registers a model folder as a new version with the alias `challenger`, once per model key.

        `example` is a sentence with `<mask>`. A call after an interrupted one completes the registration.
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
        if HALF_REGISTERED in known.tags:  # new, or left by a process that was killed at this point
            self.client.set_registered_model_alias(name, CHALLENGER, known.version)
            self.tag_version(known, {HALF_REGISTERED: ""})
            known = self.version(name, known.version)
        return known

    @translate_errors()
    def version_of(self, name: str, model_key: str) -> Version | None:
        """The version with this model key, or None."""
        query = f"name = '{name}' and tags.`distil.model_key` = '{model_key}'"
        for found in self.client.search_model_versions(query, max_results=1):
            return _version(found)
        return None

    @translate_errors()
    def version(self, name: str, version: str = "") -> Version:
        """A version with its tags; the challenger if no number is given. FatalError if it does not exist."""
        try:
            number = version or self._aliases(name).get(CHALLENGER, "")
            if not number:
                raise FatalError(f"model {name} has no {CHALLENGER}; give --version")
            return _version(self.client.get_model_version(name, number))
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            what = f"version {version} of model {name}" if version else f"model {name}"
            raise FatalError(
                f"MLflow has no {what}; give the recipe that registers it, and --version as MLflow shows it"
            ) from error

    @translate_errors()
    def named(self, uri: str) -> Version:
        """The version that `models:/NAME/NUMBER` or `models:/NAME@ALIAS` names. FatalError if it does not exist."""
        return _version(_find(self.client, uri))

    @translate_errors()
    def champion(self, name: str) -> Version | None:
        """The version with the alias `champion`, or None."""
        number = self._aliases(name).get(CHAMPION)
        return _version(self.client.get_model_version(name, number)) if number else None

    @translate_errors()
    def champions(self, name: str) -> list[Version]:
        """Past champions, oldest first, then the present one."""
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
        """The present aliases of the version, sorted; a newer version may have taken `challenger`."""
        return sorted(alias for alias, number in self._aliases(version.name).items() if number == version.version)

    @translate_errors()
    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Sets tags of a version; an empty value removes the tag."""
        for name, value in tags.items():
            if value:
                self.client.set_model_version_tag(version.name, version.version, name, value)
            elif name in version.tags:
                self.client.delete_model_version_tag(version.name, version.version, name)

    @translate_errors()
    def set_champion(self, version: Version, when: str, expected: Version | None) -> None:
        """Moves the alias `champion` to this version; `when` is the time in UTC.

        RetryableError if the champion is not the `expected` version, or changes during the call.
        """
        before = self.champion(version.name)
        if before != expected:
            raise RetryableError(
                f"the champion of {version.name} was changed by another process while the gate decided"
            )
        if before and before != version and CHAMPION_SINCE not in before.tags:
            self.tag_version(before, {CHAMPION_SINCE: when})  # the alias was set by hand in MLflow
        self.client.set_registered_model_alias(version.name, CHAMPION, version.version)
        if self.champion(version.name) != version:
            raise RetryableError(f"the champion of {version.name} was changed by another process at the same time")
        self.tag_version(version, {CHAMPION_SINCE: when})

    def _aliases(self, name: str) -> dict[str, str]:
        return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}


def open_registry(recipe: Recipe) -> ModelRegistry:
    """The registry of the recipe's MLflow."""
    return ModelRegistry(connect(recipe)[0])


@translate_errors()
def connect(recipe: Recipe) -> tuple[MlflowClient, str]:
    """A client of the recipe's MLflow and its URI; creates the folder of a local database.

    FatalError: the driver of its database is not installed. RetryableError: the database does not answer.
    """
    uri = tracking_uri(recipe)
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    try:
        return MlflowClient(uri), uri
    except ModuleNotFoundError as error:
        raise FatalError(
            f"MLflow's database {without_credentials(uri)} needs the Python package {error.name}; for PostgreSQL: "
            "pip install -e '.[postgres]'"
        ) from error


@translate_errors()
def fetch_model(recipe: Recipe, uri: str) -> Path:
    """Downloads a registered model and returns its folder, which AutoModel and AutoTokenizer load.

    `uri` is models:/NAME@ALIAS or models:/NAME/VERSION. The folder is cached below the recipe's home. FatalError if the
    model does not exist.
    """
    client, server = connect(recipe)
    found = _find(client, uri)
    # The creation time is part of the key: in a new database version numbers start at 1 again.
    cache_key = sha256_bytes(canonical_json([server, found.name, str(found.version), found.creation_timestamp]))
    folder = Path(recipe.home) / "cache" / "registered" / cache_key[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        exact = f"{REGISTERED}{found.name}/{found.version}"
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as fresh:
            copy = mlflow.artifacts.download_artifacts(exact, dst_path=f"{fresh}/whole")
            # Renamed once complete; if another process was faster, its copy is the same.
            with suppress(OSError):
                Path(copy).rename(folder)
    return folder / "model"


@translate_errors()
def champion_of(recipe: Recipe) -> Version | None:
    """The champion of the recipe's registered model, or None."""
    client, _ = connect(recipe)
    try:
        return _version(_find(client, f"{REGISTERED}{recipe.register_as.name}@{CHAMPION}"))
    except FatalError:
        return None


def _find(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that a models:/ URI names. FatalError if it does not exist."""
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
            f"MLflow has no registered model {uri}; correct the name (models:/NAME@ALIAS or "
            "models:/NAME/VERSION), or register such a model first",
            uri,
        ) from error


def _version(found: ModelVersion) -> Version:
    # The registry does not return the id of the logged model; the source of the version has it: models:/m-...
    source = found.source or ""
    logged = source.removeprefix(REGISTERED) if source.startswith(f"{REGISTERED}m-") else ""
    return Version(found.name, str(found.version), found.run_id or "", logged, dict(found.tags))


def _log_model(client: MlflowClient, run_id: str, folder: Path, example: str, trust_remote_code: bool) -> ModelInfo:
    """Logs the folder in the transformers flavour.

    MLflow stores the tokenizer in another folder than the weights. Its files are copied into `model/` as well, which
    AutoModel and AutoTokenizer then load.
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
            # Explicit: otherwise MLflow loads the model in another process to infer them.
            pip_requirements=[f"transformers=={transformers.__version__}", "torch"],
        )
    with tempfile.TemporaryDirectory() as extra:
        shutil.copytree(folder, Path(extra) / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        client.log_model_artifacts(info.model_id, extra)
    return info
