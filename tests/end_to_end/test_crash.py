"""Deployed runs that are cancelled, or whose processes are killed, in the middle of teaching and of training.

Each death strikes one run of `distill` twice. Nothing is left behind, the state is true, and Retry of that same run
ends as if nothing had happened: finished shards are not made again, the training goes on, MLflow shows one curve.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.client.schemas.objects import StateType

from storage.maintenance import verify
from tasks.train.metrics import read_metrics
from tests.harness.place import Place, make_place
from tests.harness.stack import Stack, kill, make_stack, wait_for
from tests.harness.tiny import write_oscar

pytestmark = pytest.mark.slow

STEPS = 500
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.checkpoint_steps=50",
    "train.validate_steps=0",
    "teacher.batch_rows=1",  # so that teaching lasts
    "run.task_seconds=1",
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with make_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Place:
    """A place with half a hundred shards whose targets are still to be made."""
    folder = tmp_path_factory.mktemp("blocks")
    place = make_place(folder, write_oscar(folder / "corpus", parts=1, texts=1500), teacher)
    result = place.distil("prepare", "targets.source=online")
    assert result.status == 0, result.err
    return place


@pytest.fixture
def place(blocks: Place, tmp_path: Path) -> Place:
    return blocks.copy(tmp_path / "place")


# ---- how it ends -------------------------------------------------------------------------------------------


def cancelled(stack: Stack, run) -> None:
    """Cancel in the UI: the worker tells the flow, which says so itself."""
    stack.cancel(run)
    stack.wait(run, "CANCELLED")
    wait_for(lambda: len(stack.processes()) == 1)  # the worker


def worker_killed(stack: Stack, run) -> None:
    """The flow notices that its worker died."""
    stack.workers[-1].kill()
    stack.workers[-1].wait()
    wait_for(lambda: not stack.processes())
    stack.wait(run, "CRASHED")
    stack.start_worker()


def flow_killed(stack: Stack, run) -> None:
    """The worker notices that the flow died, and everything below it does as well."""
    stack.flow_process().kill()
    wait_for(lambda: len(stack.processes()) == 1)
    stack.wait(run, "CRASHED")


def all_killed(stack: Stack, run) -> None:
    """Nobody is left to tell the server; here we do what its automation does."""
    for process in stack.processes():
        kill(process.pid)
    wait_for(lambda: not stack.processes())
    state = stack.run(run).state
    assert state
    assert state.type is StateType.RUNNING
    stack.set_state(run, StateType.CRASHED, "Crashed", force=True)
    stack.workers[-1].wait()
    stack.start_worker()


def metrics_of(place: Place) -> list[dict]:
    files = list((place.home / "run").glob("*/metrics.jsonl"))
    return read_metrics(files[0]) if files else []


def newest_checkpoint(place: Place) -> int:
    return max((receipt.settings["step"] for receipt in place.receipts("checkpoint")), default=0)


def mlflow_states(place: Place) -> dict[str, str]:
    client = MlflowClient(place.mlflow)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return {run.data.tags["distil.part"]: run.info.status for run in found}


@pytest.mark.parametrize("ends", [cancelled, worker_killed, flow_killed, all_killed])
def test_a_run_that_is_ended_twice_is_retried_to_its_end(ends: Callable[..., None], stack: Stack, place: Place) -> None:
    gently = ends in (cancelled, worker_killed)
    if not stack.workers or stack.workers[-1].poll() is not None:
        stack.start_worker()
    run = stack.start("distill", place, *SETTINGS)
    wanted = len(place.receipts("blocks"))

    wait_for(lambda: len(place.store.keys("targets")) >= 8)
    ends(stack, run)
    taught = {stamp: made for stamp, made in place.stamps().items() if stamp[0] == "targets"}
    assert 8 <= len(taught) < wanted / 2, "it was to be ended in the middle of teaching"
    assert verify(place.store) == []
    assert not place.store.failures("targets")

    stack.retry(run)
    wait_for(lambda: (lines := metrics_of(place)) and lines[-1]["step"] >= 120)
    ends(stack, run)
    curve, checkpoint = metrics_of(place), newest_checkpoint(place)
    assert 100 <= checkpoint < STEPS, "it was to be ended in the middle of training"
    if gently:
        assert checkpoint == curve[-1]["step"], "SIGTERM is answered with a checkpoint"
        assert mlflow_states(place) == {"chain": "KILLED", "train": "KILLED"}
    assert verify(place.store) == []

    stack.retry(run)
    # Not the first end that shows: Prefect's worker may tell of the death once more after the retry, and goes on then.
    wait_for(lambda: (state := stack.run(run).state) is not None and state.is_completed())
    assert stack.run(run).run_count == 3
    assert taught.items() <= place.stamps().items(), "targets that were there were made again"
    before = [line for line in curve if line["step"] <= checkpoint]
    assert metrics_of(place)[: len(before)] == before, "steps before the checkpoint were made again"
    assert set(mlflow_states(place).values()) == {"FINISHED"}
    client = MlflowClient(place.mlflow)
    (training,) = client.search_runs(
        [one.experiment_id for one in client.search_experiments()], "tags.`distil.part` = 'train'"
    )
    steps = [metric.step for metric in client.get_metric_history(training.info.run_id, "loss")]
    assert steps == list(range(1, STEPS + 1))
    wait_for(lambda: len(stack.processes()) == 1)


def test_a_training_survives_a_restart_of_the_server(stack: Stack, place: Place) -> None:
    if not stack.workers or stack.workers[-1].poll() is not None:
        stack.start_worker()
    run = stack.start("distill", place, *SETTINGS)
    wait_for(lambda: (lines := metrics_of(place)) and lines[-1]["step"] >= 50)
    assert stack.server
    stack.server.kill()
    stack.server.wait()
    gone = metrics_of(place)[-1]["step"]
    wait_for(lambda: metrics_of(place)[-1]["step"] >= gone + 100)  # nobody but us notices
    stack.start_server()
    ended = stack.wait(run, "COMPLETED")
    assert ended.run_count == 1
    assert set(mlflow_states(place).values()) == {"FINISHED"}
