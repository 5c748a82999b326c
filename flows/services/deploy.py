"""Registers the deployments FLOW/RECIPE with a Prefect server: `distil deploy [RECIPE.toml ...]`.

    deploy([load_recipe("deployments/demo.toml")], WorkPool("distil"))

deployments/prefect.yaml is a template with one deployment per flow. This module fills in its placeholders for each
recipe, and `prefect deploy` registers the result. A repeated call updates the same deployments.
"""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.templating import apply_values
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

from flows.services.automations import ensure_dead_run_automation, ensure_failure_automation
from storage.errors import FatalError
from tasks.recipe.config import Recipe

CHECKOUT = Path(__file__).resolve().parents[2]

PROJECT = CHECKOUT / "deployments" / "prefect.yaml"

ONE_AT_A_TIME = ("distill", "promote")
"""Work queues with a concurrency limit of 1. A limit on the deployment would end training runs at a server restart."""

PAGE = 200

MESSAGE_CHARACTERS = 1000
"""Prefect's error message is cut to this length, since it contains the complete form if a deployment is rejected."""

KINDS = ("process", "docker", "kubernetes")


@dataclass(frozen=True)
class WorkPool:
    """The work pool that starts the runs. A docker or kubernetes pool starts them in containers of `image`."""

    name: str = "distil"
    kind: str = "process"
    image: str = ""


@dataclass(frozen=True)
class Deployed:
    """One deployment, FLOW/RECIPE, as registered with the server."""

    name: str
    queue: str
    schedule: str


def deploy(recipes: Sequence[Recipe], pool: WorkPool, notify: str = "") -> list[Deployed]:
    """Creates or updates the work pool, its queues, the automations and one deployment per flow and recipe.

    `notify` is a notification block, TYPE/NAME, for failed runs, or "". FatalError if the server does not respond, or
    if the pool, the block or a deployment is invalid.
    """
    _check(recipes, pool)
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise FatalError(
                f"the Prefect server {client.api_url} does not respond ({error}); start `distil up`, or correct "
                "PREFECT_API_URL"
            )
        ensure_dead_run_automation(client)
        if notify:
            ensure_failure_automation(client, notify)
        ensure_work_pool(client, pool)
        _register(render(yaml.safe_load(PROJECT.read_text(encoding="utf-8")), recipes, pool))
        deployments = _deployments_of(client, {recipe.name for recipe in recipes})
        _finish_forms(client, deployments)
        return sorted((_deployed(client, one) for one in deployments), key=lambda one: one.name)


def show(deployments: Sequence[Deployed]) -> None:
    """Prints one line per deployment: name, queue, schedule."""
    width = max(len(one.name) for one in deployments)
    for one in deployments:
        print(f"{one.name:<{width}}  {one.queue:<16}  {one.schedule}".rstrip())


def render(project: dict[str, Any], recipes: Sequence[Recipe], pool: WorkPool) -> dict[str, Any]:
    """Returns the project file with all deployments for each recipe and its placeholders filled in."""
    place = {"checkout": str(CHECKOUT), "pool": {name: value for name, value in asdict(pool).items() if value}}
    rendered = [
        apply_values(entry, place | {"recipe": _values(recipe)})
        for recipe in recipes
        for entry in project["deployments"]
    ]
    return apply_values({"pull": project["pull"]}, place) | {"deployments": rendered}


def _values(recipe: Recipe) -> dict[str, Any]:
    """Returns the values of a recipe that prefect.yaml can use in placeholders."""
    return {
        "name": recipe.name,
        "values": recipe.model_dump(mode="json", by_alias=True),
        "model": recipe.register_as.name,
        "cron": recipe.watch.cron,
        "active": recipe.watch.active,
    }


def _check(recipes: Sequence[Recipe], pool: WorkPool) -> None:
    """FatalError if the recipes or the pool cannot be deployed."""
    (name, times), *_ = Counter(recipe.name for recipe in recipes).most_common(1)
    if times > 1:
        raise FatalError(
            f"{times} recipes are named {name!r}, so their deployments would have the same name; rename all but one"
        )
    if pool.kind not in KINDS:
        raise FatalError(f"the pool type {pool.kind!r} does not exist; choose one of {', '.join(KINDS)}")
    if pool.image and pool.kind == "process":
        raise FatalError("--image requires --pool-type docker or kubernetes; remove it, or set the pool type")
    if not pool.image and pool.kind != "process":
        raise FatalError(f"--pool-type {pool.kind} requires a container image; set --image")


def ensure_work_pool(client: SyncPrefectClient, pool: WorkPool) -> None:
    """Creates the work pool and its queues unless they exist. Settings of existing ones are not changed.

    Concurrent calls are safe; a starting worker may create the same pool too, and the first one wins. FatalError if an
    existing pool has a different type.
    """
    try:
        kind = client.read_work_pool(pool.name).type
    except ObjectNotFound:
        template = asyncio.run(get_default_base_job_template_for_infrastructure_type(pool.kind))
        settings = WorkPoolCreate(name=pool.name, type=pool.kind, base_job_template=template or {})
        try:
            kind = client.create_work_pool(settings).type
        except ObjectAlreadyExists:
            kind = client.read_work_pool(pool.name).type
    if kind != pool.kind:
        raise FatalError(
            f"the work pool {pool.name!r} has type {kind}, not {pool.kind}; choose a different pool with --pool, or "
            f"set --pool-type {kind}"
        )
    for queue in ONE_AT_A_TIME:
        try:
            client.read_work_queue_by_name(queue, pool.name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                client.create_work_queue(queue, concurrency_limit=1, work_pool_name=pool.name)


def _register(project: dict[str, Any]) -> None:
    """Runs `prefect deploy --all` on a project file. FatalError with the last line of output if it fails."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(project, allow_unicode=True, sort_keys=False), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)],
            cwd=CHECKOUT,  # entry points are relative to it
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        output = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        reason = output[-1][:MESSAGE_CHARACTERS] if output else "no output"
        raise FatalError(f"Prefect rejected the deployments: {reason}")


def _deployments_of(client: SyncPrefectClient, recipes: set[str]) -> list[DeploymentResponse]:
    """Returns the server's deployments of these recipes."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=["distil"]), name=DeploymentFilterName(any_=list(recipes)))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(deployment_filter=tagged, limit=PAGE, offset=len(found)):
        found += page
    return found


def _finish_forms(client: SyncPrefectClient, deployments: Sequence[DeploymentResponse]) -> None:
    """Makes three changes to the forms that Prefect derives from our flows.

    Unknown parameters are rejected, since they would crash the run. The recipe, a long section, is moved after the
    other parameters of the flow. `command`, a parameter for the command line, is removed.
    """
    for one in deployments:
        schema = deepcopy(one.parameter_openapi_schema or {}) | {"additionalProperties": False}
        schema["properties"].pop("command", None)
        schema["properties"]["recipe"]["position"] = len(schema["properties"])
        client.update_deployment(one.id, DeploymentUpdate(parameter_openapi_schema=schema))


def _deployed(client: SyncPrefectClient, deployment: DeploymentResponse) -> Deployed:
    crons = [
        f"{plan.schedule.cron}{'' if plan.active else ' (off)'}"
        for plan in deployment.schedules
        if isinstance(plan.schedule, CronSchedule)
    ]
    return Deployed(
        f"{client.read_flow(deployment.flow_id).name}/{deployment.name}",
        f"{deployment.work_pool_name}/{deployment.work_queue_name}",
        ", ".join(crons),
    )
