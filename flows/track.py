"""MLflow: the only file that imports it. Records runs, settings, data sets, curves, models and scores.

    book = open_book(recipe)
    run = book.run("train", run_key, ...)         # found again by its tags after a crash
    book.follow(run, lines)                       # metrics.jsonl, never a step twice
    version = book.register(run, folder, ...)     # one version a model key, alias `challenger`
    book.crown(version)                           # alias `champion`; flows/promote.py decides who gets it

One result has one parent run with child runs for training and scores. A run that was killed and goes on is the same
run here too, so it shows one curve.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema

from flows.home import REGISTERED, public, tracking_uri
from flows.mlflow_errors import answering
from storage.error import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.config import Recipe

BATCH_METRICS = 1000
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000
DIGEST_CHARACTERS = 36
CHALLENGER = "challenger"
CHAMPION = "champion"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a model, alias or version that is not there, or whose name cannot be one."""
CHAMPION_SINCE = "distil.champion_since"
"""Tag of every version that was ever champion: when it became one (UTC)."""
HALF_REGISTERED = "distil.half_registered"
"""Tag of a version until it has the alias `challenger`. Only then: later the alias may belong to a newer version."""
UNITS = ("step", "time")
CURVES = ("loss", "heldout_loss")
"""Training lines have the first, held-out lines the second; each kind is sent from its own last step on."""


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
class Book:
    """One MLflow experiment. `uri` is the server or database."""

    client: MlflowClient
    experiment: str
    uri: str

    @answering()
    def run(
        self, part: str, key: str, name: str, *, parent: str = "", settings: Mapping[str, Any] | None = None
    ) -> str:
        """Id of the run of this part (`chain`, `train`, `score-…`) of this run key; made on the first call.

        `settings` become parameters when it is made, or later if a kill came between. A run that had ended is running
        again.
        """
        query = f"tags.`distil.run_key` = '{key}' and tags.`distil.part` = '{part}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        known: Mapping[str, str] = {}
        if found:
            run_id: str = found[0].info.run_id
            known = found[0].data.params
            self.client.update_run(run_id, status="RUNNING")
        else:
            tags = {"distil.run_key": key, "distil.part": part} | ({"mlflow.parentRunId": parent} if parent else {})
            run_id = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        lacking = {name: value for name, value in flat(settings or {}).items() if name not in known}
        params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in lacking.items()]
        for start in range(0, len(params), BATCH_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])
        return run_id

    @answering()
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items() if value])

    @answering()
    def data(self, run_id: str, digests: Mapping[str, tuple[str, str]]) -> None:
        """Notes the data sets of a run: name -> (digest, where it is). The same one twice is one."""
        inputs = [
            DatasetInput(
                Dataset(name, digest[:DIGEST_CHARACTERS], "uri", json.dumps({"uri": place})),
                [InputTag("mlflow.data.context", "training")],
            )
            for name, (digest, place) in digests.items()
        ]
        self.client.log_inputs(run_id, datasets=inputs)

    @answering()
    def last_steps(self, run_id: str) -> dict[str, int]:
        """For each kind of line the last step that MLflow has, or -1."""
        return {
            name: max((metric.step for metric in self.client.get_metric_history(run_id, name)), default=-1)
            for name in CURVES
        }

    @answering()
    def send(self, run_id: str, lines: Sequence[Mapping[str, Any]], last: dict[str, int]) -> None:
        """Sends those lines of metrics.jsonl that lie after `last` (see `last_steps`) and moves it on."""
        batch: list[Metric] = []
        for line in lines:
            kind = CURVES[0] if CURVES[0] in line else CURVES[1]
            if line["step"] <= last[kind]:
                continue
            last[kind] = line["step"]
            stamp = int(line["time"] * 1000)
            figures = {name: value for name, value in line.items() if name not in UNITS}
            batch += [Metric(name, float(value), stamp, line["step"]) for name, value in figures.items()]
        for start in range(0, len(batch), BATCH_METRICS):
            self.client.log_batch(run_id, metrics=batch[start : start + BATCH_METRICS])

    @answering()
    def figures(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Records final figures; what is not a number is left out (it is in the score artifact)."""
        stamp = int(time.time() * 1000)
        numbers = {name: value for name, value in flat(values).items() if isinstance(value, int | float)}
        self.client.log_batch(run_id, metrics=[Metric(name, float(v), stamp, 0) for name, v in numbers.items()])

    @answering()
    def file(self, run_id: str, name: str, values: Mapping[str, Any]) -> None:
        """Keeps plain values with a run, as a JSON file."""
        self.client.log_dict(run_id, dict(values), name)

    def url(self, run_id: str) -> str:
        """Where a browser finds the run, or "" when there is only a database."""
        if not self.uri.startswith("http"):
            return ""
        return f"{public(self.uri).rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}"

    @answering()
    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    @contextmanager
    def ending(self, run_id: str) -> Iterator[None]:
        """Ends the run with the block: FINISHED, FAILED after an error, KILLED when the flow was told to stop."""
        try:
            yield
        except BaseException as error:
            # That MLflow is away as well must not hide why it ended; the next try ends the run.
            with suppress(RetryableError):
                self.end(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self.end(run_id)

    @answering()
    def version_of(self, name: str, model_key: str) -> Version | None:
        """The version that this model key was registered as, or None."""
        query = f"name = '{name}' and tags.`distil.model_key` = '{model_key}'"
        for found in self.client.search_model_versions(query, max_results=1):
            return _version(found)
        return None

    @answering()
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
            raise FatalError(f"MLflow has no {what}; give --model and --version as it shows them") from error

    def named(self, uri: str) -> Version:
        """The version that `models:/NAME/NUMBER` or `models:/NAME@ALIAS` means. FatalError where there is none."""
        name, at, alias = uri.removeprefix(REGISTERED).partition("@")
        if not at:
            name, _, number = name.partition("/")
            return self.version(name, number)
        with answering():
            known = self._aliases(name).get(alias)
        if known is None:
            raise FatalError(f"model {name} has no alias {alias}; give one that MLflow shows")
        return self.version(name, known)

    @answering()
    def champion(self, name: str) -> Version | None:
        """The version that has the alias `champion` now."""
        number = self._aliases(name).get(CHAMPION)
        return _version(self.client.get_model_version(name, number)) if number else None

    def _aliases(self, name: str) -> dict[str, str]:
        return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}

    @answering()
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

    @answering()
    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Sets tags of a version; an empty value takes the tag away."""
        for name, value in tags.items():
            if value:
                self.client.set_model_version_tag(version.name, version.version, name, value)
            elif name in version.tags:
                self.client.delete_model_version_tag(version.name, version.version, name)

    @answering()
    def crown(self, version: Version, when: str) -> None:
        """Moves the alias `champion` to this version. RetryableError if somebody else moved it at the same time."""
        before = self.champion(version.name)
        if before and before != version and CHAMPION_SINCE not in before.tags:
            self.tag_version(before, {CHAMPION_SINCE: when})  # a person gave it the alias in MLflow
        self.client.set_registered_model_alias(version.name, CHAMPION, version.version)
        if self.champion(version.name) != version:
            raise RetryableError(f"the champion of {version.name} was changed by somebody else at the same time")
        self.tag_version(version, {CHAMPION_SINCE: when})

    @answering()
    def keep(self, run_id: str, files: Mapping[str, bytes], version: Version | None = None) -> None:
        """Keeps files with a run, and beside the weights in `model/` of a version that was made here."""
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / "model"
            beside.mkdir()
            for name, data in files.items():
                (beside / name).write_bytes(data)
                self.client.log_artifact(run_id, str(beside / name))
            if version and version.model_id:
                self.client.log_model_artifacts(version.model_id, folder)

    @answering()
    def register(
        self, run_id: str, name: str, model_key: str, folder: Path, example: str, tags: Mapping[str, str]
    ) -> Version:
        """Registers a model folder as a new version with alias `challenger`, once for each model key."""
        known = self.version_of(name, model_key)
        if known is None:
            logged = _log_model(self.client, run_id, folder, example)
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


@answering()
def open_book(recipe: Recipe) -> Book:
    """Opens (and on first use makes) the recipe's experiment, with its artifacts where the recipe says.

    FatalError if the experiment has them elsewhere. RetryableError if a server does not answer.
    """
    client, uri = _client(recipe)
    name, wanted = recipe.register_as.experiment, recipe.register_as.artifacts.rstrip("/")
    found = client.get_experiment_by_name(name)
    if found is not None:
        if wanted and found.artifact_location.rstrip("/") != wanted:
            raise FatalError(
                f"MLflow's experiment {name} keeps its artifacts in {found.artifact_location} for good, not in "
                f"register.artifacts = {wanted}; name another register.experiment"
            )
        return Book(client, found.experiment_id, uri)
    beside = (Path(recipe.home) / "mlflow" / "artifacts").absolute().as_uri() if uri.startswith("sqlite:") else None
    return Book(client, client.create_experiment(name, artifact_location=wanted or beside), uri)


@answering()
def fetch_model(recipe: Recipe, uri: str) -> Path:
    """The folder of a registered model, as AutoModel and AutoTokenizer load it; kept below the recipe's home.

    `uri` is models:/NAME@ALIAS or models:/NAME/VERSION. FatalError: there is none.
    """
    client, server = _client(recipe)
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


@answering()
def champion_of(recipe: Recipe) -> Version | None:
    """The version of the recipe's registered model that has the alias `champion`, or None."""
    client, _ = _client(recipe)
    try:
        found = _find(client, f"{REGISTERED}{recipe.register_as.name}@{CHAMPION}")
    except FatalError:
        return None
    return Version(found.name, str(found.version), found.run_id or "")


def _client(recipe: Recipe) -> tuple[MlflowClient, str]:
    """A client of the recipe's MLflow, and where that is; the folder of a local database is made."""
    uri = tracking_uri(recipe)
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri), uri


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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field` -> value."""
    return dict(_flat(values, prefix))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _log_model(client: MlflowClient, run_id: str, folder: Path, example: str) -> ModelInfo:
    """Logs the folder in the transformers flavour.

    MLflow keeps the tokenizer apart from the model; its files are put beside the weights as well, so that `model/` of
    the version is what AutoModel and AutoTokenizer expect.
    """
    import transformers

    text = Schema([ColSpec(DataType.string)])
    model = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    mask = str(model.tokenizer.mask_token) if model.tokenizer else "<mask>"
    with mlflow.start_run(run_id=run_id):
        info = mlflow.transformers.log_model(
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
