"""The entry point flows/distill.py:distill with a real server and a process worker that starts in an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.place import LIMIT, REPO, History, environment, running

DEPLOY = """
import json, sys
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments import run_deployment

checkout, recipe = sys.argv[1], json.loads(sys.argv[2])
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="local", type="process"))
deployed = flow.from_source(source=checkout, entrypoint="flows/distill.py:distill")
deployed.deploy(name="tiny", work_pool_name="local", print_next_steps=False, parameters={"recipe": recipe})
run = run_deployment("distill/tiny", timeout=200, poll_interval=1, as_subflow=False)
print(json.dumps([run.state.type, run.state.message]))
"""


@pytest.mark.slow
def test_a_deployment_runs_from_any_folder(history: History, teacher: Path, server: str, tmp_path: Path) -> None:
    """The recipe comes as the parameter form gives it, the corpus is ready, the training is new."""
    place = history.place.copy(tmp_path / "place", without=("model", "checkpoint", "scores"))
    recipe = {
        "name": "tiny",
        "home": str(place.home),
        "corpus": {"url": str(history.place.folder / "corpus"), "heldout_per_mille": 100, "shard_bytes": 10_000},
        "blocks": {"length": 32},
        "teacher": {"model": str(teacher)},
        "student": {"layers": 2},
        "train": {"max_steps": 5, "batch_rows": 6, "threads": 1, "device": "cpu"},
        "register": {"name": "from-a-worker"},
        "score": {"heldout_rows": 16, "latency_runs": 0},
    }
    variables = environment(tmp_path, server)
    worker = ["prefect", "worker", "start", "--pool", "local", "--type", "process"]
    with running(worker, tmp_path / "worker", variables):
        result = subprocess.run(
            [sys.executable, "-c", DEPLOY, str(REPO), json.dumps(recipe)],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    log = (tmp_path / "worker" / "log").read_text(encoding="utf-8")
    assert result.returncode == 0, result.stderr + log
    kind, message = json.loads(result.stdout.splitlines()[-1])
    assert kind == "COMPLETED", log
    assert "from-a-worker version 1" in message
    assert place.receipts("model")
