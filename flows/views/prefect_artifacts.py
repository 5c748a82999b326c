"""Publishes Prefect artifacts of a run: its progress, its failed shards, its result and a link to MLflow.

    with ProgressArtifact("blocks", 2000) as progress: progress.add(); progress.publish()
    publish_failures(recipe, failures, command)

Artifacts are for display only: if Prefect's server does not respond, a warning is logged and the run continues.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from httpx import HTTPError
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.views.tables import Table, failure_rows, failure_table, how_to_retry_all, markdown, show_table
from storage.artifact import Failure
from tasks.recipe.config import Recipe

PROGRESS_SECONDS = 5.0
"""Minimum time in seconds between two updates of a progress artifact. Each update is a request to the server."""

FAILURE_ROWS = 1000
"""Maximum number of rows in the failure table. The store has all failures."""


@contextmanager
def best_effort() -> Iterator[None]:
    """Turns an error of Prefect's server into a warning, so that the run continues."""
    try:
        yield
    except HTTPError as error:
        get_run_logger().warning(f"could not publish an artifact to the Prefect server: {error}")


def publish_failures(recipe: Recipe, failures: tuple[Failure, ...], command: str = "") -> None:
    """Prints the failure table and publishes it as an artifact of the flow run; `command` as in `how_to_retry`."""
    if not failures:
        return
    rows = failure_rows(recipe, failures[:FAILURE_ROWS], command)
    show_table(failure_table(rows))
    more = f" (the first {FAILURE_ROWS} are listed)" if failures[FAILURE_ROWS:] else ""
    with best_effort():
        about = f"{len(failures)} artifacts failed{more}; all others are done. {how_to_retry_all(recipe, command)}"
        create_table_artifact(rows, "failures", about)


def publish_result(table: Table, mlflow_url: str) -> None:
    """Publishes the final table as Markdown, and a link to MLflow if it has a web page."""
    with best_effort():
        create_markdown_artifact(markdown(table), "result", "Results of the run and where to find them")
        if mlflow_url:
            create_link_artifact(mlflow_url, "MLflow run", "mlflow-run")


class ProgressArtifact:
    """Publishes the progress of a stage in percent. A stage that ends within PROGRESS_SECONDS has no artifact."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self._artifact: UUID | None = None
        self._lock = threading.Lock()
        self._published = time.monotonic()

    def add(self) -> None:
        """Counts one more finished job; thread-safe."""
        with self._lock:
            self.done += 1

    def publish(self) -> None:
        """Writes the percentage, at most once per PROGRESS_SECONDS."""
        if time.monotonic() - self._published < PROGRESS_SECONDS:
            return
        self._published = time.monotonic()
        with best_effort():
            if self._artifact is None:
                about = f"Progress of the stage {self.stage}, {self.total} jobs in total"
                made = create_progress_artifact(self._percent(), f"progress-{self.stage}", about)
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, self._percent())

    def _percent(self) -> float:
        return 100.0 * self.done / self.total

    def __enter__(self) -> "ProgressArtifact":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run that is being stopped has only seconds left, so its progress is not updated.
        if self._artifact is not None and kind is None:
            with best_effort():
                update_progress_artifact(self._artifact, self._percent())
