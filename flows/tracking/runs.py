"""MLflow's runs: settings, data sets, curves, files and scores of what was done. Models are in registry.py.

    book = open_book(recipe)
    run = book.run("train", run_key, ...)              # found again by its tags after a crash
    book.send(run, lines, book.last_steps(run))        # metrics.jsonl, never a step twice
    version = book.registry.register(run, name, ...)

One result has one parent run with child runs for training and scores. A run that was killed and goes on is the same
run here too, so it shows one curve.
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
from flows.tracking.errors import translate_errors
from flows.tracking.registry import ModelRegistry, Version, connect
from storage.errors import FatalError, RetryableError
from tasks.recipe.config import Recipe

BATCH_METRICS = 1000

BATCH_PARAMS = 100

PARAM_CHARACTERS = 6000

DIGEST_CHARACTERS = 36

UNITS = ("step", "time")

CURVES = ("loss", "heldout_loss")
"""Training lines have the first, held-out lines the second; each kind is sent from its own last step on."""


@dataclass(frozen=True)
class MlflowRuns:
    """One MLflow experiment. `uri` is the server or database."""

    client: MlflowClient
    experiment: str
    uri: str

    @property
    def registry(self) -> ModelRegistry:
        """The models of the same MLflow."""
        return ModelRegistry(self.client)

    @translate_errors()
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

    @translate_errors()
    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items() if value])

    @translate_errors()
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

    @translate_errors()
    def last_steps(self, run_id: str) -> dict[str, int]:
        """For each kind of line the last step that MLflow has, or -1."""
        return {
            name: max((metric.step for metric in self.client.get_metric_history(run_id, name)), default=-1)
            for name in CURVES
        }

    @translate_errors()
    def send(self, run_id: str, lines: Sequence[Mapping[str, Any]], last: dict[str, int]) -> None:
        """Sends those lines of metrics.jsonl that lie after `last` (see `last_steps`) and then moves it on.

        RetryableError: MLflow is away; the same lines may be sent again.
        """
        batch: list[Metric] = []
        reached = dict(last)
        for line in lines:
            kind = CURVES[0] if CURVES[0] in line else CURVES[1]
            if line["step"] <= reached[kind]:
                continue
            reached[kind] = line["step"]
            stamp = int(line["time"] * 1000)
            figures = {name: value for name, value in line.items() if name not in UNITS}
            batch += [Metric(name, float(value), stamp, line["step"]) for name, value in figures.items()]
        for start in range(0, len(batch), BATCH_METRICS):
            self.client.log_batch(run_id, metrics=batch[start : start + BATCH_METRICS])
        last.update(reached)

    @translate_errors()
    def figures(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Records final figures; what is not a number is left out (it is in the score artifact)."""
        stamp = int(time.time() * 1000)
        numbers = {name: value for name, value in flat(values).items() if isinstance(value, int | float)}
        self.client.log_batch(run_id, metrics=[Metric(name, float(v), stamp, 0) for name, v in numbers.items()])

    @translate_errors()
    def file(self, run_id: str, name: str, values: Mapping[str, Any]) -> None:
        """Keeps plain values with a run, as a JSON file."""
        self.client.log_dict(run_id, dict(values), name)

    def url(self, run_id: str) -> str:
        """Where a browser finds the run, or "" when there is only a database."""
        if not self.uri.startswith("http"):
            return ""
        return f"{without_credentials(self.uri).rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}"

    @translate_errors()
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

    @translate_errors()
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


@translate_errors()
def open_mlflow_runs(recipe: Recipe) -> MlflowRuns:
    """Opens (and on first use makes) the recipe's experiment, with its artifacts where the recipe says.

    FatalError if the experiment has them elsewhere. RetryableError if a server does not answer.
    """
    client, uri = connect(recipe)
    name, wanted = recipe.register_as.experiment, recipe.register_as.artifacts.rstrip("/")
    found = client.get_experiment_by_name(name)
    if found is not None:
        if wanted and found.artifact_location.rstrip("/") != wanted:
            raise FatalError(
                f"MLflow's experiment {name} keeps its artifacts in {found.artifact_location} for good, not in "
                f"register.artifacts = {wanted}; name another register.experiment"
            )
        return MlflowRuns(client, found.experiment_id, uri)
    served = uri.startswith("http")  # then the server knows where artifacts lie
    beside = None if served else (Path(recipe.home) / "mlflow" / "artifacts").absolute().as_uri()
    return MlflowRuns(client, client.create_experiment(name, artifact_location=wanted or beside), uri)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.field` -> value."""
    return dict(_flat(values, prefix))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
