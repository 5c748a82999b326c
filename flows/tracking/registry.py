"""MLflow's model registry: versions of a model, their tags, and the aliases `challenger` and `champion`.

    registry = open_registry(recipe)
    version = registry.register(run_id, name, model_key, folder, ...)     # one a model key, alias `challenger`
    registry.named("models:/NAME@ALIAS"), registry.version("NAME", "3"), registry.champion("NAME")
    registry.set_champion(version, when)                                         # flows/promote.py decides who gets it

The runs that versions come from are in flows/tracking/runs.py.
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
from flows.tracking.errors import translate_errors
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.recipe.config import Recipe

CHALLENGER = "challenger"

CHAMPION = "champion"

ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a model, alias or version that is not there, or whose name cannot be one."""

CHAMPION_SINCE = "distil.champion_since"
"""Tag of every version that was ever champion: when it became one (UTC)."""

HALF_REGISTERED = "distil.half_registered"
"""Tag of a version until it has the alias `challenger`. Only then: later the alias may belong to a newer version."""


@dataclass(frozen=True)
class Version:
    """A registered model."""

    name: str
    version: str
    run_id: str
    model_id: str = field(default="", compare=False)
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def uri(self) -> str:
        """What `mlflow.transformers.load_model` takes."""
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
        """Registers a model folder as a new version with alias `challenger`, once for each model key."""
        known = self.version_of(name, model_key)
        if known is None:
            logged = _log_model(self.client, run_id, folder, example, trust_remote_code)
            if not any(model.name == name for model in self.client.search_registered_models(f"name = '{name}'")):
                self.client.create_registered_model(name)
            kept = {key: value for key, value in tags.items() if value}
            kept |= {"distil.model_key": model_key, HALF_REGISTERED: "its alias is still to be set"}
            made = self.client.create_model_version(
                name,
                logged.model_uri,
                run_id=run_id,
                tags=kept,
                model_id=logged.model_id,  # a server asks for it, a database does not
            )
            known = _version(made)
        if HALF_REGISTERED in known.tags:  # by us, or by a run that was killed here
            self.client.set_registered_model_alias(name, CHALLENGER, known.version)
            self.tag_version(known, {HALF_REGISTERED: ""})
            known = self.version(name, known.version)
        return known

    @translate_errors()
    def version_of(self, name: str, model_key: str) -> Version | None:
        """The version that this model key was registered as, or None."""
        query = f"name = '{name}' and tags.`distil.model_key` = '{model_key}'"
        for found in self.client.search_model_versions(query, max_results=1):
            return _version(found)
        return None

    @translate_errors()
    def version(self, name: str, version: str = "") -> Version:
        """A version with its tags, the challenger if no number is given. FatalError where there is none."""
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
        """The version that `models:/NAME/NUMBER` or `models:/NAME@ALIAS` means. FatalError where there is none."""
        return _version(_find(self.client, uri))

    @translate_errors()
    def champion(self, name: str) -> Version | None:
        """The version that has the alias `champion` now."""
        number = self._aliases(name).get(CHAMPION)
        return _version(self.client.get_model_version(name, number)) if number else None

    @translate_errors()
    def champions(self, name: str) -> list[Version]:
        """All versions that were ever champion, oldest first; the one that is champion now is the last."""
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
        """The aliases that the version has now; a newer one may have taken `challenger`."""
        return sorted(alias for alias, number in self._aliases(version.name).items() if number == version.version)

    @translate_errors()
    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Sets tags of a version; an empty value takes the tag away."""
        for name, value in tags.items():
            if value:
                self.client.set_model_version_tag(version.name, version.version, name, value)
            elif name in version.tags:
                self.client.delete_model_version_tag(version.name, version.version, name)

    @translate_errors()
    def set_champion(self, version: Version, when: str, judged_against: Version | None) -> None:
        """Moves the alias `champion` to this version. RetryableError if somebody else moved it meanwhile."""
        before = self.champion(version.name)
        if before != judged_against:
            raise RetryableError(f"the champion of {version.name} was changed by somebody else while it was judged")
        if before and before != version and CHAMPION_SINCE not in before.tags:
            self.tag_version(before, {CHAMPION_SINCE: when})  # a person gave it the alias in MLflow
        self.client.set_registered_model_alias(version.name, CHAMPION, version.version)
        if self.champion(version.name) != version:
            raise RetryableError(f"the champion of {version.name} was changed by somebody else at the same time")
        self.tag_version(version, {CHAMPION_SINCE: when})

    def _aliases(self, name: str) -> dict[str, str]:
        return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}


def open_registry(recipe: Recipe) -> ModelRegistry:
    """The registry of the recipe's MLflow."""
    return ModelRegistry(connect(recipe)[0])


@translate_errors()
def connect(recipe: Recipe) -> tuple[MlflowClient, str]:
    """A client of the recipe's MLflow, and where that is; the folder of a local database is made.

    FatalError: the driver of its database is not installed. RetryableError: a database does not answer.
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
    """The folder of a registered model, as AutoModel and AutoTokenizer load it; kept below the recipe's home.

    `uri` is models:/NAME@ALIAS or models:/NAME/VERSION. FatalError: there is none.
    """
    client, server = connect(recipe)
    found = _find(client, uri)
    # With its time: in a new database the numbers of versions begin again.
    named = sha256_bytes(canonical_json([server, found.name, str(found.version), found.creation_timestamp]))
    folder = Path(recipe.home) / "cache" / "registered" / named[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        exact = f"{REGISTERED}{found.name}/{found.version}"
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as fresh:
            copy = mlflow.artifacts.download_artifacts(exact, dst_path=f"{fresh}/whole")
            # Under its name only when it is whole; where another process was faster, its copy is the same.
            with suppress(OSError):
                Path(copy).rename(folder)
    return folder / "model"


@translate_errors()
def champion_of(recipe: Recipe) -> Version | None:
    """The version of the recipe's registered model that has the alias `champion`, or None."""
    client, _ = connect(recipe)
    try:
        return _version(_find(client, f"{REGISTERED}{recipe.register_as.name}@{CHAMPION}"))
    except FatalError:
        return None


def _find(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that a models:/ URI names. FatalError if there is none."""
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
    # The registry keeps no id of the logged model, only where the version came from: models:/m-...
    source = found.source or ""
    logged = source.removeprefix(REGISTERED) if source.startswith(f"{REGISTERED}m-") else ""
    return Version(found.name, str(found.version), found.run_id or "", logged, dict(found.tags))


def _log_model(client: MlflowClient, run_id: str, folder: Path, example: str, trust_remote_code: bool) -> ModelInfo:
    """Logs the folder in the transformers flavour.

    MLflow keeps the tokenizer apart from the model; its files are put beside the weights as well, so that `model/` of
    the version is what AutoModel and AutoTokenizer expect.
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
            # Given, so that MLflow does not load the model in another process to find out.
            pip_requirements=[f"transformers=={transformers.__version__}", "torch"],
        )
    with tempfile.TemporaryDirectory() as extra:
        shutil.copytree(folder, Path(extra) / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        client.log_model_artifacts(info.model_id, extra)
    return info
