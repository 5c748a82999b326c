"""What a run shows of itself in Prefect, as artifacts: progress, failed shards, the result and the way to MLflow.

    with ProgressArtifact("blocks", 2000) as progress: progress.add(); progress.tell()
    publish_failures(recipe, failures, command)

All of it is a view: where Prefect's server does not answer, a warning goes to the log and the work goes on.
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
"""The progress artifact is written at most this often: it costs a call to the server."""

FAILURE_ROWS = 1000
"""The failure table shows no more; the store keeps all of them."""


@contextmanager
def best_effort() -> Iterator[None]:
    """Keeps a run going when the server that shows it is away for a while."""
    try:
        yield
    except HTTPError as error:
        get_run_logger().warning(f"Prefect's server did not take an artifact: {error}")


def publish_failures(recipe: Recipe, failures: tuple[Failure, ...], command: str = "") -> None:
    """The failure table on the screen and as an artifact of the flow run; `command` as in `how_to_retry`."""
    if not failures:
        return
    rows = failure_rows(recipe, failures[:FAILURE_ROWS], command)
    show_table(failure_table(rows))
    more = f" (the first {FAILURE_ROWS} are listed)" if failures[FAILURE_ROWS:] else ""
    with best_effort():
        about = f"{len(failures)} failed{more}; all others are done. {how_to_retry_all(recipe, command)}"
        create_table_artifact(rows, "failures", about)


def publish_result(table: Table, mlflow_url: str) -> None:
    """The final table as Markdown, and the way to MLflow where it has a page."""
    with best_effort():
        create_markdown_artifact(markdown(table), "result", "What was made and where it is")
        if mlflow_url:
            create_link_artifact(mlflow_url, "MLflow run", "mlflow-run")


class ProgressArtifact:
    """Percentage of a stage, for stages that last."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self._artifact: UUID | None = None
        self._lock = threading.Lock()
        self._told = time.monotonic()

    def add(self) -> None:
        """Counts one more; jobs end in threads of their own."""
        with self._lock:
            self.done += 1

    def tell(self) -> None:
        """Writes the percentage if it was not written lately."""
        if time.monotonic() - self._told < PROGRESS_SECONDS:
            return
        self._told = time.monotonic()
        with best_effort():
            if self._artifact is None:
                about = f"Progress of {self.stage}, {self.total} in all"
                made = create_progress_artifact(self._percent(), f"progress-{self.stage}", about)
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, self._percent())

    def _percent(self) -> float:
        return 100.0 * self.done / self.total

    def __enter__(self) -> "ProgressArtifact":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run that is told to stop has seconds; its progress stays as it was last told.
        if self._artifact is not None and kind is None:
            with best_effort():
                update_progress_artifact(self._artifact, self._percent())
