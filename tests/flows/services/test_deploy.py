"""Deployments as `distil deploy` registers them: what the server has, its forms, and what it refuses."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments import run_deployment
from prefect.events import Event
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.services.deploy import CHECKOUT, PROJECT, WorkPool, deploy, ensure_work_pool, render
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import load_recipe
from tests.flows.conftest import DeployedRecipe
from tests.harness.output import refusal
from tests.harness.project import make_project
from tests.harness.servers.prefect_server import working

FLOWS = ["distill", "prepare", "score", "promote", "retry-shard", "watch-snapshots"]
OWN_QUEUE = ("distill", "promote")
BOUNDS = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})
BUNDLED = sorted(PROJECT.parent.glob("*.toml"))


# ---- the project file --------------------------------------------------------------------------------------


def rendered(pool: WorkPool) -> dict[str, Any]:
    return render(yaml.safe_load(PROJECT.read_text()), [load_recipe(path) for path in BUNDLED], pool)


def test_every_bundled_recipe_gets_every_flow_and_no_brace_is_left() -> None:
    project = rendered(WorkPool("my-pool"))
    names = {(entry["entrypoint"], entry["name"]) for entry in project["deployments"]}
    assert len(names) == len(project["deployments"]) == len(FLOWS) * len(BUNDLED)
    assert "{{" not in yaml.safe_dump(project)
    assert project["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}]
    for entry in project["deployments"]:
        assert Recipe.model_validate(entry["parameters"]["recipe"]).name == entry["name"]
        assert entry["work_pool"]["name"] == "my-pool"
        assert "image" not in entry["work_pool"]["job_variables"]


def test_runs_of_a_deployment_get_absolute_paths_of_the_folder_of_deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an image that is its working folder, /state; runs start in the checkout, which is read-only there."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(BUNDLED[0], ["home=state"])
    project = render(yaml.safe_load(PROJECT.read_text()), [recipe], WorkPool())
    for entry in project["deployments"]:
        given = entry["parameters"]["recipe"]
        assert (given["home"], given["store"]) == (f"{tmp_path}/state", f"{tmp_path}/state/store")


def test_a_snapshot_is_announced_to_the_watcher_of_one_recipe() -> None:
    entries = rendered(WorkPool("my-pool"))["deployments"]
    heard = {
        trigger["match"]["prefect.resource.id"]: (entry["entrypoint"], entry["name"])
        for entry in entries
        for trigger in entry.get("triggers", ())
    }
    recipes = {entry["name"] for entry in entries}
    assert heard == {f"corpus.{name}": ("flows/watch.py:watch_snapshots", name) for name in recipes}


def test_a_container_pool_gets_the_image() -> None:
    for entry in rendered(WorkPool("far", "kubernetes", "registry/distil:1"))["deployments"]:
        assert entry["work_pool"]["job_variables"]["image"] == "registry/distil:1"


@pytest.mark.parametrize(
    ("pool", "times", "message"),
    [
        (WorkPool("p", "ecs"), 1, "the pool type 'ecs' does not exist"),
        (WorkPool("p", "docker"), 1, "--image"),
        (WorkPool("p", "process", "image"), 1, "--image"),
        (WorkPool(), 2, "named 'demo'"),
    ],
)
def test_invalid_deployments_are_refused_before_a_request_to_the_server(
    pool: WorkPool, times: int, message: str
) -> None:
    recipes = [load_recipe(PROJECT.parent / "demo.toml")] * times
    with pytest.raises(FatalError, match=message):
        deploy(recipes, pool)


def test_without_a_server_one_sentence_says_how_to_get_one(distil) -> None:
    done = distil("deploy", "tiny.toml")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "distil: no Prefect server was found; start `distil up` in another terminal, or set PREFECT_API_URL"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.lr=7", "train.lr: Input should be less than or equal to 1"), ("train.lrr=7", "train.lrr: Extra inputs")],
)
def test_the_command_line_refuses_a_bad_value_and_an_unknown_name(distil, override: str, message: str) -> None:
    done = distil("run", "tiny.toml", override)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ---- the work pool -----------------------------------------------------------------------------------------


def test_two_concurrent_calls_create_one_work_pool(prefect_api: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read that the pool, and the queues, do not exist before either creates one."""
    both = threading.Barrier(2, timeout=60)

    def slow(read: Callable[..., Any]) -> Callable[..., Any]:
        missed: set[tuple[int, object]] = set()

        def wait_where_nothing_is(client: SyncPrefectClient, name: str, *more: Any) -> Any:
            try:
                return read(client, name, *more)
            except ObjectNotFound:
                if (call := (threading.get_ident(), name)) not in missed:
                    missed.add(call)
                    both.wait()
                raise

        return wait_where_nothing_is

    for read in ("read_work_pool", "read_work_queue_by_name"):
        monkeypatch.setattr(SyncPrefectClient, read, slow(getattr(SyncPrefectClient, read)))

    def create() -> None:
        with get_client(sync_client=True) as client:
            ensure_work_pool(client, WorkPool("raced"))

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(contextvars.copy_context().run, create) for _ in range(2)]:
            done.result()
    with get_client(sync_client=True) as client:
        assert client.read_work_pool("raced").type == "process"
        assert [client.read_work_queue_by_name(queue, "raced").concurrency_limit for queue in OWN_QUEUE] == [1, 1]
        with pytest.raises(FatalError, match="has type process, not docker"):
            ensure_work_pool(client, WorkPool("raced", "docker", "image"))


# ---- what the server has -----------------------------------------------------------------------------------


@pytest.mark.guard
@pytest.mark.slow
def test_the_server_has_one_deployment_for_each_flow(deployed: DeployedRecipe) -> None:
    for flow in FLOWS:
        deployment = deployed.deployment(flow)
        assert set(deployment["tags"]) == {"distil", "tiny"}
        assert deployment["description"]
        assert deployment["work_pool_name"] == "distil"
        assert deployment["work_queue_name"] == (flow if flow in OWN_QUEUE else "default")
        assert deployment["concurrency_limit"] is None
        assert Recipe.model_validate(deployment["parameters"]["recipe"]) == load_recipe(deployed.project.recipe)
        assert bool(deployment["schedules"]) == (flow == "watch-snapshots")
    with deployed.client() as client:
        queues = client.post("/work_pools/distil/queues/filter", json={}).json()
    assert {queue["name"]: queue["concurrency_limit"] for queue in queues} == {
        "default": None,
        "distill": 1,
        "promote": 1,
    }


@pytest.mark.slow
def test_deploying_again_changes_nothing(deployed: DeployedRecipe) -> None:
    def registered() -> list[Any]:
        with deployed.client() as client:
            automations = client.post("/automations/filter", json={}).json()
            pool = client.get("/work_pools/distil").json()["id"]
        ids = [(deployed.deployment(flow)["id"], deployed.deployment(flow)["parameters"]) for flow in FLOWS]
        plan = [(plan["id"], plan["schedule"], plan["active"]) for plan in deployed.deployment(FLOWS[-1])["schedules"]]
        # Prefect creates the watcher's trigger again; our automations must stay, with the heartbeats they wait for.
        ours = [one if one["name"].endswith("runs") else one["name"] for one in automations]
        return [ids, plan, sorted(map(str, ours)), pool]

    before = registered()
    again = deployed.deploy()
    assert again.status == 0
    assert [line.split()[0] for line in again.out.splitlines()] == sorted(f"{flow}/tiny" for flow in FLOWS)
    assert "17 3 * * *" in again.out
    assert registered() == before
    assert len(before[1]) == 1
    assert CronSchedule.model_validate(before[1][0][1]).cron == "17 3 * * *"
    assert before[1][0][2] is True


@pytest.mark.slow
def test_a_published_snapshot_starts_the_watcher_and_nothing_else(deployed: DeployedRecipe) -> None:
    """The event of another corpus, sent before, starts nothing."""
    ids = ("corpus.tiny-2", "corpus.other", "corpus.tiny")
    events = [Event(event="corpus.snapshot.published", resource={"prefect.resource.id": one}) for one in ids]
    with deployed.client() as client:

        def automatic() -> list[dict[str, Any]]:
            runs = client.post("/flow_runs/filter", json={}).json()
            return [run for run in runs if run["created_by"] and run["created_by"]["type"] == "AUTOMATION"]

        client.post("/events", json=[event.model_dump(mode="json") for event in events]).raise_for_status()
        end = time.monotonic() + 60
        while not automatic() and time.monotonic() < end:
            time.sleep(0.3)
        time.sleep(3)  # runs of the other events would start within that time
        started = automatic()
    assert [run["deployment_id"] for run in started] == [deployed.deployment("watch-snapshots")["id"]]
    assert "distil" in started[0]["tags"]


@pytest.mark.slow
def test_a_docker_pool_is_made_by_prefects_own_schema(deployed: DeployedRecipe, tmp_path: Path) -> None:
    project = make_project(tmp_path, tmp_path, tmp_path)
    project.recipe.write_text(project.recipe.read_text().replace('name = "tiny"', 'name = "far"'), encoding="utf-8")
    far = deployed._replace(project=project)
    done = far.deploy("--pool", "boxes", "--pool-type", "docker", "--image", "registry/distil:1")
    assert done.status == 0, done.err
    with deployed.client() as client:
        pool = client.get("/work_pools/boxes").json()
        variables = client.get("/deployments/name/distill/far").json()["job_variables"]
        known = client.get("/collections/views/aggregate-worker-metadata").json()
    assert pool["type"] == "docker"
    assert variables["image"] == "registry/distil:1"
    for kind in ("docker", "kubernetes"):
        template = known[f"prefect-{kind}"][kind]["default_base_job_configuration"]
        assert set(variables) <= set(template["variables"]["properties"])
    assert pool["base_job_template"] == known["prefect-docker"]["docker"]["default_base_job_configuration"]
    assert "has type docker, not process" in refusal(far.deploy("--pool", "boxes"))


# ---- the form ----------------------------------------------------------------------------------------------


def fields(schema: dict[str, Any], definitions: dict[str, Any], values: Any, path: str = "") -> Iterator[Any]:
    """Every field of a form, sections included: its path, its schema, and its value in the deployment or None."""
    for name, field in schema["properties"].items():
        if "$ref" in field:
            field = definitions[field["$ref"].rsplit("/", 1)[-1]] | field
        value = values.get(name) if isinstance(values, dict) else None
        yield f"{path}{name}", field, value
        if "properties" in field:
            yield from fields(field, definitions, value, f"{path}{name}.")


def numbers(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The numeric parts of a field: itself, an alternative, an item."""
    if field.get("type") in ("integer", "number"):
        yield field
    for part in (*field.get("anyOf", ()), *field.get("prefixItems", ()), field.get("items")):
        if isinstance(part, dict):
            yield from numbers(part)


@pytest.mark.guard
@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_a_description_a_default_and_bounds(deployed: DeployedRecipe, flow: str) -> None:
    deployment = deployed.deployment(flow)
    schema = deployment["parameter_openapi_schema"]
    found = list(fields(schema, schema["definitions"], deployment["parameters"]))
    assert len(found) > 80
    assert [path for path, field, _ in found if not field.get("description")] == []
    assert [path for path, field, value in found if "default" not in field and value is None] == []
    unbounded = [
        path for path, field, _ in found for part in numbers(field) if not all(part.keys() & ends for ends in BOUNDS)
    ]
    assert unbounded == []


@pytest.mark.slow
def test_the_form_is_grouped_as_the_recipe_file_and_the_recipe_comes_last(deployed: DeployedRecipe) -> None:
    schema = deployed.deployment("retry-shard")["parameter_openapi_schema"]
    assert list(schema["definitions"]["Recipe"]["properties"]) == [
        field.alias or name for name, field in Recipe.model_fields.items()
    ]
    assert sorted(schema["properties"], key=lambda name: schema["properties"][name]["position"]) == [
        "stage",
        "shard",
        "force",
        "recipe",
    ]
    assert "targets" in schema["properties"]["stage"]["enum"]


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.guard
@pytest.mark.slow
def test_bad_parameters_are_refused_before_a_run_exists(deployed: DeployedRecipe) -> None:
    with deployed.client() as client:
        before = client.post("/flow_runs/count", json={}).json()
        for flow, parameters, message in (
            ("distill", {"recipe": deployed.recipe(train={"lr": 7})}, "recipe.train.lr"),
            ("distill", {"recipe": deployed.recipe(train={"lrr": 1e-3})}, "lrr"),
            ("prepare", {"recipe": deployed.recipe() | {"trian": {}}}, "trian"),
            ("retry-shard", {"stage": "sharrd"}, "stage"),
            ("retry-shard", {"stagee": "shard"}, "stagee"),
        ):
            answer = deployed.create_run(flow, parameters)
            assert answer.status_code == 409, answer.text
            assert message in answer.json()["detail"]
        assert client.post("/flow_runs/count", json={}).json() == before


@pytest.mark.slow
def test_run_deployment_refuses_them_too(deployed: DeployedRecipe) -> None:
    with temporary_settings({PREFECT_API_URL: deployed.api}):
        for parameters in ({"recipe": deployed.recipe(mask={"rate": 0.9})}, {"recipes": {}}):
            with pytest.raises(PrefectHTTPStatusError, match="409"):
                run_deployment("distill/tiny", parameters=parameters, timeout=0, as_subflow=False)


@pytest.mark.slow
def test_rules_across_fields_end_a_run_at_once_with_one_sentence(deployed: DeployedRecipe, tmp_path: Path) -> None:
    """The worker starts the run in an empty folder."""
    nothing = {"distil": 0.0, "cosine": 0.0, "mlm": 0.0}
    answer = deployed.create_run("distill", {"recipe": deployed.recipe(loss=nothing)})
    assert answer.status_code == 201
    run = answer.json()["id"]
    with working(tmp_path / "worker", deployed.api, "distil"):
        state = deployed.ended(run)
    assert state["type"] == "FAILED"
    expected = "recipe: loss: distil, cosine and mlm are all 0; set at least one of them to a positive weight"
    assert state["message"] == expected
