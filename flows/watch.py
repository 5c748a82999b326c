"""A new snapshot of the corpus starts one run of `distill/RECIPE`, once, and only when it is whole.

    distil watch RECIPE.toml                        one look, from the command line
    flows/watch.py:watch_snapshots                  entry point of the deployments `watch-snapshots/RECIPE`

Only this flow starts runs for snapshots, be it called by the clock or by the event `corpus.snapshot.published`. What it
saw and what it took is remembered in the store; two of them at once ask the server for the same run and get one.
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

from flows.home import open_store
from flows.pipeline.finished import all_done
from flows.pipeline.task_policy import bound_flow, run_one
from storage.errors import FatalError, RetryableError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.listing import Folder, list_folder, subfolders
from tasks.corpus.snapshot import snapshot_of
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

LOOKS = "looks"
"""Topic in the store: since when the files of a folder have been what they are."""

TAKEN = "taken"
"""Topic in the store: which listing of a snapshot which run was started for."""


@dataclass(frozen=True)
class SnapshotCheck:
    """What one look at a snapshot saw: a fingerprint of all its files, for how many seconds they have been the same,
    and what it lacks to be whole ("" if nothing)."""

    url: str
    listing: str
    age: float
    lacking: str

    @property
    def name(self) -> str:
        """The snapshot's own name."""
        return _last_part(self.url)

    def __str__(self) -> str:
        return f"{self.name} ({self.listing[:12]})"


def run_watch(recipe: Recipe) -> State[Any]:
    """Looks once for a new snapshot of the corpus and starts a run of `distill` for it, if it is whole and new.

    Args:
        recipe: Its section `watch` says where to look; the run that is started gets the whole recipe.
    """
    recipe = with_absolute_paths(recipe)
    store = open_store(recipe)
    said: list[str] = []
    for url in _snapshots(recipe):
        look = _settled_check(store, recipe, url)
        if not look.lacking:
            said.append(_take(store, recipe, look))
            break  # what is older than a whole snapshot is history
        said.append(f"{look.name} is not whole yet: {look.lacking}")
    return Completed(message="; ".join(said) or f"nothing new: {recipe.watch.folder} holds no snapshot yet")


watch_snapshots = bound_flow(run_watch, "watch-snapshots", run_name="{name}")


# ---- looking -----------------------------------------------------------------------------------------------


def _snapshots(recipe: Recipe) -> list[str]:
    """URLs of all snapshots, the newest first."""
    folder = recipe.watch.folder
    if not folder:
        return [recipe.corpus.url]
    return run_one("look", _last_part(folder), partial(subfolders, folder), recipe.run)[::-1]


def _last_part(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _at(recipe: Recipe, url: str) -> Recipe:
    """The recipe, with one snapshot as its corpus."""
    return recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"url": url})})


def _settled_check(store: Store, recipe: Recipe, url: str) -> SnapshotCheck:
    """A look that another, `watch.settle_seconds` earlier, agrees with; waits for it where nobody has looked before."""
    look = _check(store, recipe, url)
    wait = recipe.watch.settle_seconds - look.age
    if look.lacking or wait <= 0 or _taken(store, recipe, look):
        return look
    get_run_logger().info(f"{look} looks whole; looking again in {wait:.0f} seconds")
    time.sleep(wait)
    again = _check(store, recipe, url)
    if again.lacking or again.listing == look.listing:
        return again
    return replace(again, lacking="its files are still changing")


def _check(store: Store, recipe: Recipe, url: str) -> SnapshotCheck:
    return run_one("look", _last_part(url), partial(check_snapshot, store, _at(recipe, url)), recipe.run)


def check_snapshot(store: Store, recipe: Recipe) -> SnapshotCheck:
    """One look at the folder `corpus.url`, remembered for the next one.

    FatalError: it cannot be listed, or holds what no snapshot may hold and is no copy in progress.
    """
    start = time.time()
    folder = list_folder(recipe.corpus.url)
    age = max(0.0, start - _unchanged_since(store, folder))
    try:
        lacking = _lacking(folder, recipe)
    except FatalError as error:
        if age >= recipe.watch.settle_seconds:
            raise
        lacking = error.message
    return SnapshotCheck(folder.url, folder.fingerprint, age, lacking)


def _unchanged_since(store: Store, folder: Folder) -> float:
    """When (seconds since 1970) the files of a folder were first seen as they are now."""
    noted = store.recall(LOOKS, folder.url)
    if noted is not None and noted["listing"] == folder.fingerprint:
        return float(noted["since"])
    since = time.time()
    store.remember(LOOKS, folder.url, {"url": folder.url, "listing": folder.fingerprint, "since": since})
    return since


def _lacking(folder: Folder, recipe: Recipe) -> str:
    """Why the folder cannot be whole, or "". FatalError as `snapshot_of`; half a checksum file gives that too."""
    if not folder.files:
        return "it is empty"
    absent = snapshot_of(folder, recipe.corpus, partial=True).absent
    if not absent:
        return ""
    more = f", and so are {len(absent) - 1} others" if absent[1:] else ""
    return f"{absent[0]} is named in a checksum file but not there{more}"


# ---- taking ------------------------------------------------------------------------------------------------


def _key(recipe: Recipe, look: SnapshotCheck) -> str:
    """One run for this recipe, store and listing, for ever; the server holds to it too."""
    return sha256_bytes(canonical_json([recipe.name, recipe.store, look.listing]))


def _taken(store: Store, recipe: Recipe, look: SnapshotCheck) -> dict[str, Any] | None:
    return store.recall(TAKEN, _key(recipe, look))


def _take(store: Store, recipe: Recipe, look: SnapshotCheck) -> str:
    """Starts the run for a whole snapshot, unless it was taken or processed before; says which."""
    taken = _taken(store, recipe, look)
    if taken is not None:
        return f"nothing new: {look} taken already{', run ' + taken['run'] if taken['run'] else ''}"
    recipe = _at(recipe, look.url)
    if all_done(store, recipe):
        store.remember(TAKEN, _key(recipe, look), {"url": look.url, "run": ""})
        return f"nothing new: {look} is processed already"
    run = run_one("start", look.name, partial(_start, _warm(recipe), _key(recipe, look)), recipe.run)
    # After the run is there: who dies in between asks for the same run again.
    store.remember(TAKEN, _key(recipe, look), {"url": look.url, "run": f"{run.name} ({run.id})"})
    return f"snapshot {look} taken: run {run.name} ({run.id})"


def _warm(recipe: Recipe) -> Recipe:
    """The recipe, with today's champion to start from if it wants one; by number, so that a Retry gets the same."""
    if not recipe.watch.warm_start:
        return recipe
    from flows.tracking.registry import champion_of  # deferred: MLflow takes seconds to import

    champion = champion_of(recipe)
    if champion is None:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"warm_start": champion.uri})})


def _start(recipe: Recipe, key: str) -> FlowRun:
    """Asks the server for the run of this key; whoever asks first makes it."""
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
            raise RetryableError(f"the Prefect server could not start {name}: {error}", name) from error
        raise FatalError(
            f"the deployment {name} does not take this recipe; run `distil deploy` again ({error})", name
        ) from error
    except HTTPError as error:
        raise RetryableError(f"the Prefect server did not answer: {error}", name) from error
