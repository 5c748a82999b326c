"""Starts one run of `distill/RECIPE` for each new snapshot of the corpus, once the snapshot is complete.

    distil watch RECIPE.toml                        one check, from the command line
    flows/watch.py:watch_snapshots                  entry point of the deployments `watch-snapshots/RECIPE`

Only this flow starts runs for snapshots, on a schedule or on the event `corpus.snapshot.published`. The listings that
it has seen and the runs that it has started are recorded in the store. Concurrent watchers start only one run.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from httpx import HTTPError, HTTPStatusError
from prefect import State, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from flows.home import open_workspace
from flows.pipeline.already_done import all_done
from flows.pipeline.task_policy import bound_flow, run_one
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.listing import FolderListing, list_folder, subfolders
from tasks.corpus.snapshot import snapshot_of
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

CHECKS_TOPIC = "looks"
"""Topic of the notes in the store that record since when the files of a folder have been unchanged."""

STARTED_TOPIC = "taken"
"""Topic of the notes in the store that record the run started for each listing of a snapshot."""


@dataclass(frozen=True)
class SnapshotCheck:
    """Result of one check of a snapshot.

    `listing` is the fingerprint of the snapshot's files, `age` the seconds for which they have been unchanged, and
    `incomplete_reason` the reason why the snapshot is incomplete ("" if it is complete).
    """

    url: str
    listing: str
    age: float
    incomplete_reason: str

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return _last_part(self.url)

    def __str__(self) -> str:
        return f"{self.name} ({self.listing[:12]})"


def run_watch(recipe: Recipe) -> State[Any]:
    """Checks once for a new snapshot of the corpus, and starts a run of `distill` for it if it is complete.

    Args:
        recipe: The recipe of the run to start. Its setting `watch.folder` is the folder of the snapshots.
    """
    recipe = with_absolute_paths(recipe)
    workspace = open_workspace(recipe)
    outcomes: list[str] = []
    for url in _snapshots(recipe):
        check = _settled_check(_at(workspace, url))
        if not check.incomplete_reason:
            outcomes.append(_start_run_once(_at(workspace, url), check))
            break  # snapshots older than a complete one need no check
        outcomes.append(f"{check.name} is not complete yet: {check.incomplete_reason}")
    return Completed(message="; ".join(outcomes) or f"nothing new: {recipe.watch.folder} contains no snapshot yet")


watch_snapshots = bound_flow(run_watch, "watch-snapshots", run_name="{name}")


# ---- checking ----------------------------------------------------------------------------------------------


def _snapshots(recipe: Recipe) -> list[str]:
    """Returns the URLs of all snapshots, newest first."""
    folder = recipe.watch.folder
    if not folder:
        return [recipe.corpus.url]
    return run_one("check", _last_part(folder), partial(subfolders, folder), recipe.run)[::-1]


def _last_part(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _at(workspace: Workspace, url: str) -> Workspace:
    """Returns the workspace with the snapshot at `url` as its corpus."""
    return workspace.with_changes({"corpus.url": url})


def _settled_check(workspace: Workspace) -> SnapshotCheck:
    """Checks a snapshot and, if it changed recently, checks it again after `watch.settle_seconds` without changes.

    Returns the last check. A snapshot whose files changed in between is incomplete.
    """
    check = _check(workspace)
    wait = workspace.recipe.watch.settle_seconds - check.age
    if check.incomplete_reason or wait <= 0 or _recorded_run(workspace, check):
        return check
    get_run_logger().info(f"{check} seems complete; checking again in {wait:.0f} seconds")
    time.sleep(wait)
    again = _check(workspace)
    if again.incomplete_reason or again.listing == check.listing:
        return again
    return replace(again, incomplete_reason="its files are still changing")


def _check(workspace: Workspace) -> SnapshotCheck:
    recipe = workspace.recipe
    return run_one("check", _last_part(recipe.corpus.url), partial(check_snapshot, workspace), recipe.run)


def check_snapshot(workspace: Workspace) -> SnapshotCheck:
    """Checks the folder `corpus.url` once, and stores its listing for the next check.

    FatalError: the folder cannot be listed, or it contains invalid files and has been unchanged for
    `watch.settle_seconds`, so that it is not a copy in progress.
    """
    recipe, start = workspace.recipe, time.time()
    folder = list_folder(recipe.corpus.url)
    age = max(0.0, start - _unchanged_since(workspace.store, folder))
    try:
        reason = _incomplete_reason(folder, recipe)
    except FatalError as error:
        if age >= recipe.watch.settle_seconds:
            raise
        reason = error.message
    return SnapshotCheck(folder.url, folder.fingerprint, age, reason)


def _unchanged_since(store: Store, folder: FolderListing) -> float:
    """Returns the time (seconds since 1970) at which the current files of a folder were first seen."""
    known = store.recall(CHECKS_TOPIC, folder.url)
    if known is not None and known["listing"] == folder.fingerprint:
        return float(known["since"])
    since = time.time()
    store.remember(CHECKS_TOPIC, folder.url, {"url": folder.url, "listing": folder.fingerprint, "since": since})
    return since


def _incomplete_reason(folder: FolderListing, recipe: Recipe) -> str:
    """Returns the reason why the folder is incomplete, or "". Raises FatalError for invalid files, as `snapshot_of`."""
    if not folder.files:
        return "it is empty"
    absent = snapshot_of(folder, recipe.corpus, partial=True).absent
    if not absent:
        return ""
    more = f" (and {len(absent) - 1} more)" if absent[1:] else ""
    return f"{absent[0]} is listed in a checksum file but does not exist{more}"


# ---- starting the run --------------------------------------------------------------------------------------


def _key(recipe: Recipe, check: SnapshotCheck) -> str:
    """Returns the idempotency key of the run for this recipe, store and listing. Prefect creates one run per key."""
    return sha256_bytes(canonical_json([recipe.name, recipe.store, check.listing]))


def _recorded_run(workspace: Workspace, check: SnapshotCheck) -> dict[str, Any] | None:
    return workspace.store.recall(STARTED_TOPIC, _key(workspace.recipe, check))


def _start_run_once(workspace: Workspace, check: SnapshotCheck) -> str:
    """Starts a run for a complete snapshot unless it was taken or processed before. Returns a message for the user."""
    store, recipe, key = workspace.store, workspace.recipe, _key(workspace.recipe, check)
    taken = _recorded_run(workspace, check)
    if taken is not None:
        return f"nothing new: {check} was taken before{', run ' + taken['run'] if taken['run'] else ''}"
    if all_done(workspace):
        store.remember(STARTED_TOPIC, key, {"url": check.url, "run": ""})
        return f"nothing new: {check} was processed before"
    run = run_one("start", check.name, partial(_start, _warm(recipe), key), recipe.run)
    # Stored after the server has the run: if the watcher dies in between, the next one requests the same run.
    store.remember(STARTED_TOPIC, key, {"url": check.url, "run": f"{run.name} ({run.id})"})
    return f"snapshot {check} taken: run {run.name} ({run.id})"


def _warm(recipe: Recipe) -> Recipe:
    """Returns the recipe; with `watch.warm_start`, the run starts from the current champion.

    The champion is named by version number, so that a retried run starts from the same model.
    """
    if not recipe.watch.warm_start:
        return recipe
    from flows.tracking.model_registry import champion_of  # deferred: MLflow takes seconds to import

    champion = champion_of(recipe)
    if champion is None:
        return recipe
    return recipe.with_changes({"train.warm_start": champion.uri})


def _start(recipe: Recipe, key: str) -> FlowRun:
    """Requests a run with this idempotency key from the Prefect server, which creates it only once."""
    name = f"distill/{recipe.name}"
    try:
        run = run_deployment(
            name,
            parameters={"recipe": recipe.model_dump(mode="json", by_alias=True)},
            flow_run_name=recipe.name,
            timeout=0,
            as_subflow=False,
            idempotency_key=key,
        )
        return cast(FlowRun, run)
    except ObjectNotFound as error:
        raise FatalError(f"the Prefect server has no deployment {name}; run `distil deploy` first", name) from error
    except HTTPStatusError as error:
        if error.response.is_server_error:
            raise RetryableError(
                f"the Prefect server could not start {name} ({error}); try again, or read the server's log", name
            ) from error
        raise FatalError(
            f"the deployment {name} does not accept this recipe; run `distil deploy` again ({error})", name
        ) from error
    except HTTPError as error:
        raise RetryableError(f"the Prefect server did not respond: {error}", name) from error
