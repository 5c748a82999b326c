"""MLflow: the only file that imports it. Records runs, settings, data sets, curves, models and scores.

    book = open_book(recipe)
    run = book.run("train", run_key, ...)         # found again by its tags after a crash
    book.follow(run, lines)                       # metrics.jsonl, never a step twice
    version = book.register(run, folder, ...)     # one version a model key, alias `challenger`

One result has one parent run with child runs for training and scores. A run that was killed and goes on is the same
run here too, so it shows one curve.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema
from requests.exceptions import RequestException

from flows.home import tracking_uri
from storage.error import RetryableError
from tasks.config import Recipe

BATCH_METRICS = 1000
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000
DIGEST_CHARACTERS = 36
CHALLENGER = "challenger"
REGISTERED = "models:/"
UNITS = ("step", "time")
CURVES = ("loss", "heldout_loss")
"""Training lines have the first, held-out lines the second; each kind is sent from its own last step on."""


@contextmanager
def answering() -> Iterator[None]:
    """What MLflow raises becomes a RetryableError: its server or database may be back in a moment."""
    try:
        yield
    except (MlflowException, RequestException) as error:
        raise RetryableError(f"MLflow did not answer: {str(error).strip().splitlines()[0]}") from error


@dataclass(frozen=True)
class Version:
    """A registered model."""

    name: str
    version: str
    run_id: str

    @property
    def uri(self) -> str:
        """What `mlflow.transformers.load_model` takes."""
        return f"models:/{self.name}/{self.version}"


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

        `settings` become parameters when it is made. A run that had ended is running again.
        """
        query = f"tags.`distil.run_key` = '{key}' and tags.`distil.part` = '{part}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        if found:
            run_id: str = found[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {"distil.run_key": key, "distil.part": part} | ({"mlflow.parentRunId": parent} if parent else {})
        run_id = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in flat(settings or {}).items()]
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
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}" if "http" in self.uri[:5] else ""

    @answering()
    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    @answering()
    def version_of(self, name: str, model_key: str) -> Version | None:
        """The version that this model key was registered as, or None."""
        query = f"name = '{name}' and tags.`distil.model_key` = '{model_key}'"
        for found in self.client.search_model_versions(query, max_results=1):
            return Version(name, str(found.version), found.run_id or "")
        return None

    @answering()
    def register(
        self, run_id: str, name: str, model_key: str, folder: Path, example: str, tags: Mapping[str, str]
    ) -> Version:
        """Registers a model folder as a new version with alias `challenger`, once for each model key."""
        known = self.version_of(name, model_key)
        if known is None:
            source = _log_model(self.client, run_id, folder, example)
            if not any(model.name == name for model in self.client.search_registered_models(f"name = '{name}'")):
                self.client.create_registered_model(name)
            kept = {key: value for key, value in tags.items() if value} | {"distil.model_key": model_key}
            made = self.client.create_model_version(name, source, run_id=run_id, tags=kept)
            known = Version(name, str(made.version), run_id)
            self.client.set_registered_model_alias(name, CHALLENGER, known.version)
        return known


@answering()
def open_book(recipe: Recipe) -> Book:
    """Opens (and on first use makes) the recipe's experiment. RetryableError if a server does not answer."""
    uri = tracking_uri(recipe)
    local = uri.startswith("sqlite:")
    if local:
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    name = recipe.register_as.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return Book(client, found.experiment_id, uri)
    artifacts = (Path(recipe.home) / "mlflow" / "artifacts").absolute().as_uri() if local else None
    return Book(client, client.create_experiment(name, artifact_location=artifacts), uri)


@answering()
def fetch_model(recipe: Recipe, uri: str) -> Path:
    """The folder of a registered model (`models:/NAME@ALIAS`), as AutoModel and AutoTokenizer load it."""
    mlflow.set_tracking_uri(tracking_uri(recipe))
    return Path(mlflow.artifacts.download_artifacts(uri)) / "model"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field` -> value."""
    return dict(_flat(values, prefix))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _log_model(client: MlflowClient, run_id: str, folder: Path, example: str) -> str:
    """Logs the folder in the transformers flavour; returns the URI of the logged model.

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
    return str(info.model_uri)
