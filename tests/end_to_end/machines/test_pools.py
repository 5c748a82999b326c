"""Text on one work pool, targets and training on another: two deployments that share only the store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter

from storage.artifact import NODE
from tasks.recipe.load import load_recipe
from tests.harness.processes import wait_for
from tests.harness.project import make_project
from tests.harness.servers.prefect_server import working
from tests.harness.tiny import write_oscar

pytestmark = pytest.mark.slow


@pytest.fixture
def pools(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Workers for the pools `cpu` and `gpu`, as on two machines of these names."""
    monkeypatch.setenv(NODE, "cpu")
    with working(tmp_path / "cpu-worker", server, "cpu"):
        monkeypatch.setenv(NODE, "gpu")
        with working(tmp_path / "gpu-worker", server, "gpu"):
            yield server


@pytest.mark.guard
def test_text_is_made_on_one_pool_and_the_rest_on_another(pools: str, teacher: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", write_oscar(tmp_path / "corpus", parts=2), teacher)
    text = tmp_path / "text.toml"
    text.write_text(project.recipe.read_text().replace('name = "tiny"', 'name = "text"'))
    for pool, recipes in (("cpu", [str(text)]), ("gpu", [])):
        deployed = project.distil("deploy", *recipes, "--pool", pool, server=pools)
        assert deployed.status == 0, deployed.err
    recipe = load_recipe(project.recipe, ['run.text_on="prepare/text"', "train.max_steps=4"])
    with SyncPrefectClient(pools) as client:
        deployment = client.read_deployment_by_name("distill/tiny")
        parameters = {"recipe": recipe.model_dump(mode="json", by_alias=True)}
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        wait_for(lambda: (state := client.read_flow_run(run.id).state) and state.is_final())
        ended = client.read_flow_run(run.id)
        assert ended.state
        assert ended.state.is_completed(), ended.state
        (child,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run.id]}))
    assert (ended.work_pool_name, child.work_pool_name) == ("gpu", "cpu")
    hosts = {
        kind: {receipt.host for receipt in project.receipts(kind)} for kind in ("shard", "blocks", "targets", "model")
    }
    assert hosts == {"shard": {"cpu"}, "blocks": {"cpu"}, "targets": {"gpu"}, "model": {"gpu"}}


def test_a_missing_deployment_is_named(teacher: Path, tmp_path: Path, server: str) -> None:
    project = make_project(tmp_path / "project", write_oscar(tmp_path / "corpus", parts=1), teacher)
    result = project.distil("run", "run.text_on=prepare/absent", server=server)
    assert result.status == 1
    assert "the deployment run.text_on = prepare/absent does not exist" in result.err
