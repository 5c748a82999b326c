"""Deployed runs that are cancelled, or whose processes are killed, while targets are computed and while they train.

One run of `distill` is ended twice in the same way. No process is left behind, the state is correct, and Retry of that
run completes it: finished shards are not computed again, the training resumes, MLflow shows one curve.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.client.schemas.objects import StateType

from storage.verify import verify
from tasks.train.metrics import read_metrics
from tests.harness.processes import kill, wait_for
from tests.harness.programs.slow_trainer import slow_trainer
from tests.harness.project import Project, make_project
from tests.harness.servers.prefect_server import PrefectServer, serving
from tests.harness.tiny import write_oscar

pytestmark = pytest.mark.slow

STEPS = 500
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.checkpoint_steps=50",
    "train.validate_steps=0",
    "teacher.batch_rows=1",  # so that computing the targets lasts
    "run.task_seconds=1",
)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with serving(tmp_path_factory.mktemp("server")) as own_server:
        own_server.create_pool()
        yield own_server


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Project:
    """A project with about fifty shards that have no targets yet."""
    folder = tmp_path_factory.mktemp("blocks")
    project = make_project(folder, write_oscar(folder / "corpus", parts=1, texts=1500), teacher)
    result = project.distil("prepare", "targets.source=online")
    assert result.status == 0, result.err
    return project


@pytest.fixture
def project(blocks: Project, tmp_path: Path) -> Project:
    return blocks.copy(tmp_path / "project")


# ---- ways to end it -------------------------------------------------------------------------------------------


def cancelled(own_server: PrefectServer, run) -> None:
    """Cancel in the UI: the worker signals the flow, which reports its state."""
    own_server.cancel(run)
    own_server.wait(run, "CANCELLED")
    wait_for(lambda: len(own_server.processes()) == 1)  # the worker


def worker_killed(own_server: PrefectServer, run) -> None:
    """The flow notices that its worker died."""
    own_server.workers[-1].kill()
    own_server.workers[-1].wait()
    wait_for(lambda: not own_server.processes())
    own_server.wait(run, "CRASHED")
    own_server.start_worker()


def flow_killed(own_server: PrefectServer, run) -> None:
    """The worker notices that the flow died, and everything below it does as well."""
    own_server.flow_process().kill()
    wait_for(lambda: len(own_server.processes()) == 1)
    own_server.wait(run, "CRASHED")


def all_killed(own_server: PrefectServer, run) -> None:
    """No process is left that could inform the server; the test does what the server's automation does."""
    for process in own_server.processes():
        kill(process.pid)
    wait_for(lambda: not own_server.processes())
    state = own_server.read_run(run).state
    assert state
    assert state.type is StateType.RUNNING
    own_server.set_state(run, StateType.CRASHED, "Crashed", force=True)
    own_server.workers[-1].wait()
    own_server.start_worker()


def metrics_of(project: Project) -> list[dict]:
    files = list((project.home / "run").glob("*/metrics.jsonl"))
    return read_metrics(files[0]) if files else []


def newest_checkpoint(project: Project) -> int:
    return max((receipt.settings["step"] for receipt in project.receipts("checkpoint")), default=0)


def mlflow_states(project: Project) -> dict[str, str]:
    client = MlflowClient(project.mlflow)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return {run.data.tags["distil.part"]: run.info.status for run in found}


@pytest.mark.parametrize(
    "ends", [cancelled, worker_killed, pytest.param(flow_killed, marks=pytest.mark.guard), all_killed]
)
def test_a_run_that_is_ended_twice_is_retried_to_its_end(
    ends: Callable[..., None], own_server: PrefectServer, project: Project
) -> None:
    gently = ends in (cancelled, worker_killed)
    own_server.ensure_worker()
    release = project.folder / "release"
    run = own_server.create_run("distill", project, *SETTINGS, slow_trainer(100, release))
    wanted = len(project.receipts("blocks"))

    wait_for(lambda: len(project.store.keys("targets")) >= 8)
    ends(own_server, run)
    finished = {stamp: made for stamp, made in project.creation_times().items() if stamp[0] == "targets"}
    assert 8 <= len(finished) < wanted, "all targets were computed before the run ended"
    assert verify(project.store) == []
    assert not project.store.failures("targets")

    own_server.retry(run)
    wait_for(lambda: (lines := metrics_of(project)) and lines[-1]["step"] >= 110)
    ends(own_server, run)
    curve, checkpoint = metrics_of(project), newest_checkpoint(project)
    assert 100 <= checkpoint < STEPS, "the training was over before the run ended"
    if gently:
        assert checkpoint == curve[-1]["step"], "SIGTERM is answered with a checkpoint"
        assert mlflow_states(project) == {"chain": "KILLED", "train": "KILLED"}
    assert verify(project.store) == []

    release.touch()
    own_server.retry(run)
    # The first final state is not always the last: Prefect's worker may report the death once more after the retry.
    wait_for(lambda: (state := own_server.read_run(run).state) is not None and state.is_completed())
    assert own_server.read_run(run).run_count == 3
    assert finished.items() <= project.creation_times().items(), "finished targets were computed again"
    before = [line for line in curve if line["step"] <= checkpoint]
    assert metrics_of(project)[: len(before)] == before, "steps before the checkpoint were repeated"
    assert set(mlflow_states(project).values()) == {"FINISHED"}
    client = MlflowClient(project.mlflow)
    (training,) = client.search_runs(
        [one.experiment_id for one in client.search_experiments()], "tags.`distil.part` = 'train'"
    )
    steps = [metric.step for metric in client.get_metric_history(training.info.run_id, "loss")]
    assert steps == list(range(1, STEPS + 1))
    wait_for(lambda: len(own_server.processes()) == 1)


def test_a_training_survives_a_restart_of_the_server(own_server: PrefectServer, project: Project) -> None:
    own_server.ensure_worker()
    release = project.folder / "release"
    run = own_server.create_run("distill", project, *SETTINGS, slow_trainer(50, release))
    wait_for(lambda: (lines := metrics_of(project)) and lines[-1]["step"] >= 50)
    own_server.kill()
    gone = metrics_of(project)[-1]["step"]
    wait_for(lambda: metrics_of(project)[-1]["step"] >= gone + 10)  # the training continues without a server
    own_server.start()
    release.touch()
    ended = own_server.wait(run, "COMPLETED")
    assert ended.run_count == 1
    assert set(mlflow_states(project).values()) == {"FINISHED"}
