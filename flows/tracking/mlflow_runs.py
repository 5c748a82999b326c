"""Records a recipe's work as MLflow runs: settings, data sets, training curves, files and scores.

    mlflow_runs = open_mlflow_runs(recipe)
    run_id = mlflow_runs.start_or_resume_run("train", run_key, ...)     # the same run after a crash, by its tags
    mlflow_runs.log_curves(run_id, lines, mlflow_runs.last_steps(run_id))       # new lines of metrics.jsonl only
    version = mlflow_runs.registry.register(run_id, name, ...)

Each result has one parent run with child runs for training and scores. A training run that was killed and resumed is
one MLflow run with one curve. Models and their versions are in model_registry.py.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from flows.home import without_credentials
from flows.tracking.mlflow_errors import translate_errors
from flows.tracking.model_registry import ModelRegistry, Version, connect
from storage.errors import FatalError, RetryableError
from tasks.recipe.config import Recipe

BATCH_METRICS = 1000

BATCH_PARAMS = 100

PARAM_CHARACTERS = 6000

DIGEST_CHARACTERS = 36

UNITS = ("step", "time")
"""Fields of metrics.jsonl that are the axes of the curves, not metrics."""

EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""Tag with which the UI of MLflow 3 shows an experiment in its mode "Model training"."""

CURVES = ("loss", "heldout_loss")
"""Metrics that identify a training line and a held-out line. The last step sent is tracked separately for each."""


@dataclass(frozen=True)
class MlflowRuns:
    """The runs of one MLflow experiment. `experiment` is its id, `uri` the address of the server or database."""

    client: MlflowClient
    experiment: str
    uri: str

    @property
    def registry(self) -> ModelRegistry:
        """The registered models of the same MLflow."""
        return ModelRegistry(self.client)

    @translate_errors()
    def start_or_resume_run(
        self, part: str, key: str, name: str, *, parent: str = "", settings: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the id of the MLflow run of one part (`chain`, `train`, `score-…`) of a run key.

        Creates the run on the first call. `settings` are logged as parameters; existing parameters are not changed. The
        status of a run that had ended is set to RUNNING.
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

    @translate_errors()
    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run. Empty values are ignored."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items() if value])

    @translate_errors()
    def log_inputs(self, run_id: str, digests: Mapping[str, tuple[str, str]]) -> None:
        """Logs data sets of a run; `digests` maps a name to (digest, URI). Repeated calls have no effect."""
        inputs = [
            DatasetInput(
                Dataset(name, digest[:DIGEST_CHARACTERS], "uri", json.dumps({"uri": uri})),
                [InputTag("mlflow.data.context", "training")],
            )
            for name, (digest, uri) in digests.items()
        ]
        self.client.log_inputs(run_id, datasets=inputs)

    @translate_errors()
    def last_steps(self, run_id: str) -> dict[str, int]:
        """Returns the last step of each metric in CURVES that MLflow has, or -1."""
        return {
            name: max((metric.step for metric in self.client.get_metric_history(run_id, name)), default=-1)
            for name in CURVES
        }

    @translate_errors()
    def log_curves(self, run_id: str, lines: Sequence[Mapping[str, Any]], last: dict[str, int]) -> None:
        """Logs the lines of metrics.jsonl with steps after `last` (see `last_steps`), and updates `last` in place.

        RetryableError: MLflow does not respond; `last` is unchanged, so the same lines can be logged again.
        """
        batch: list[Metric] = []
        reached = dict(last)
        for line in lines:
            kind = CURVES[0] if CURVES[0] in line else CURVES[1]
            if line["step"] <= reached[kind]:
                continue
            reached[kind] = line["step"]
            milliseconds = int(line["time"] * 1000)
            values = {name: value for name, value in line.items() if name not in UNITS}
            batch += [Metric(name, float(value), milliseconds, line["step"]) for name, value in values.items()]
        for start in range(0, len(batch), BATCH_METRICS):
            self.client.log_batch(run_id, metrics=batch[start : start + BATCH_METRICS])
        last.update(reached)

    @translate_errors()
    def log_metrics(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Logs final metrics at step 0. Values that are not numbers are omitted; the score artifact contains them."""
        now = int(time.time() * 1000)
        numbers = {name: value for name, value in flat(values).items() if isinstance(value, int | float)}
        self.client.log_batch(run_id, metrics=[Metric(name, float(v), now, 0) for name, v in numbers.items()])

    @translate_errors()
    def log_json(self, run_id: str, name: str, values: Mapping[str, Any]) -> None:
        """Logs plain values as a JSON file with a run."""
        self.client.log_dict(run_id, dict(values), name)

    def url(self, run_id: str) -> str:
        """The URL of the run's page, or "" for a database without a server."""
        if not self.uri.startswith("http"):
            return ""
        return f"{without_credentials(self.uri).rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}"

    @translate_errors()
    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run with the status FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    @contextmanager
    def ending(self, run_id: str) -> Iterator[None]:
        """Ends the run after the `with` block as FINISHED, after an error as FAILED, after an interrupt as KILLED."""
        try:
            yield
        except BaseException as error:
            # If MLflow does not respond, the first error must still be raised; the next attempt ends the run.
            with suppress(RetryableError):
                self.end(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self.end(run_id)

    @translate_errors()
    def log_files(self, run_id: str, files: Mapping[str, bytes], version: Version | None = None) -> None:
        """Logs files with a run and, if the logged model of `version` is known, in its folder `model/`."""
        with tempfile.TemporaryDirectory() as folder:
            model_folder = Path(folder) / "model"
            model_folder.mkdir()
            for name, data in files.items():
                (model_folder / name).write_bytes(data)
                self.client.log_artifact(run_id, str(model_folder / name))
            if version and version.model_id:
                self.client.log_model_artifacts(version.model_id, folder)


@translate_errors()
def open_mlflow_runs(recipe: Recipe) -> MlflowRuns:
    """Opens the recipe's experiment, or creates it with its artifacts at `register.artifacts`.

    An experiment without a kind gets the kind of model training. FatalError if an existing experiment stores its
    artifacts elsewhere. RetryableError if the server does not respond.
    """
    client, uri = connect(recipe)
    kind, model_training = EXPERIMENT_KIND
    name, wanted = recipe.register_as.experiment, recipe.register_as.artifacts.rstrip("/")
    found = client.get_experiment_by_name(name)
    if found is not None:
        if wanted and found.artifact_location.rstrip("/") != wanted:
            raise FatalError(
                f"MLflow's experiment {name} stores its artifacts in {found.artifact_location}, which cannot be "
                f"changed to register.artifacts = {wanted}; set register.experiment to a new name"
            )
        if kind not in found.tags:
            client.set_experiment_tag(found.experiment_id, kind, model_training)
        return MlflowRuns(client, found.experiment_id, uri)
    served = uri.startswith("http")  # a server has its own default location
    default = None if served else (Path(recipe.home) / "mlflow" / "artifacts").absolute().as_uri()
    experiment = client.create_experiment(name, artifact_location=wanted or default, tags={kind: model_training})
    return MlflowRuns(client, experiment, uri)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings; the keys of the result are `section.field`."""
    return dict(_flat(values, prefix))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
