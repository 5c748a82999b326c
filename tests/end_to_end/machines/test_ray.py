"""Shards, blocks and targets on a Ray cluster of two nodes: the same bytes, on both nodes, also when one is killed."""

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import FlowRunSort

from storage.artifact import Receipt
from tests.harness.processes import kill_tree, running
from tests.harness.project import Project, ended, environment, make_project
from tests.harness.tiny import write_oscar

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.slow

KINDS = ("source", "shard", "blocks")
SLOTS = 1
"""CPUs of each node, which is the number of tasks in flight there."""
START = ("ray.scripts.scripts", "start", "--block", f"--num-cpus={SLOTS}")


@dataclass
class Cluster:
    """Two nodes; `second` can be killed."""

    address: str
    second: subprocess.Popen[bytes]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A short path: the names of Ray's sockets are long and the kernel takes 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ("--node-ip-address=127.0.0.1", "--disable-usage-stats")
    head = ("--head", f"--port={address.rsplit(':')[1]}", f"--temp-dir={folder}", "--include-dashboard=false")
    try:
        variables = environment(folder)
        first = running([*START, *common, *head], folder / "first", variables)
        other = running([*START, *common, f"--address={address}"], folder / "second", variables)
        with first, other as second:
            wait_for_nodes(address, 2, folder)
            yield Cluster(address, second)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(address: str, wanted: int, folder: Path) -> None:
    """Polls the cluster until the wanted number of nodes is alive."""
    asked = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + 180
    while True:
        command = [sys.executable, "-c", asked, address]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(folder))
        if found.stdout.strip().endswith(str(wanted)):
            return
        assert time.monotonic() < end, found.stderr + (folder / "second" / "log").read_text()
        time.sleep(1)


def projects(tmp_path: Path, teacher: Path, parts: int, texts: int) -> tuple[Project, Project]:
    """A project for worker processes and one for Ray, over the same corpus."""
    corpus = write_oscar(tmp_path / "corpus", parts=parts, texts=texts)
    return make_project(tmp_path / "here", corpus, teacher), make_project(tmp_path / "ray", corpus, teacher)


def by_label(receipts: list[Receipt]) -> dict[tuple[str, str], Receipt]:
    return {(one.kind, one.label): one for one in receipts}


def test_two_nodes_make_the_bytes_of_worker_processes(
    cluster: Cluster, teacher: Path, tmp_path: Path, server: str
) -> None:
    here, ray = projects(tmp_path, teacher, parts=4, texts=200)
    done = here.distil("prepare", server=server)
    assert done.status == 0, done.err
    done = ray.distil("prepare", "run.engine=ray", f"ray.address={cluster.address}", server=server)
    assert done.status == 0, done.err

    mine, theirs = (by_label(project.receipts(*KINDS)) for project in (ray, here))
    assert {one: receipt.files for one, receipt in mine.items()} == {one: r.files for one, r in theirs.items()}
    assert len({receipt.host for receipt in mine.values()}) == 2
    targets, others = (by_label(project.receipts("targets")) for project in (ray, here))
    assert targets.keys() == others.keys()
    assert len({receipt.host for receipt in targets.values()}) == 2
    for one, receipt in targets.items():
        assert receipt.key == others[one].key
        assert receipt.info["digest"] == others[one].info["digest"]


@pytest.mark.guard
def test_a_killed_node_costs_only_what_was_in_flight_there(
    cluster: Cluster, teacher: Path, tmp_path: Path, server: str
) -> None:
    here, ray = projects(tmp_path, teacher, parts=12, texts=60)
    settings = ("run.engine=ray", f"ray.address={cluster.address}", "run.task_seconds=0", "run.retry_seconds=1")
    process = ray.start("prepare", *settings, server=server)
    hosts: set[str] = set()
    while len(hosts) < 2:  # both nodes have made some, and work on others
        assert process.poll() is None, process.communicate()
        hosts = {receipt.host for receipt in ray.receipts("source", "blocks")}
        time.sleep(0.1)
    # A source that was being read has left shards already, which are made again with it.
    before = {stamp: made for stamp, made in ray.creation_times().items() if stamp[0] != "shard"}
    kill_tree(cluster.second)
    result = ended(process)
    assert result.status == 0, result.err

    after = ray.creation_times()
    assert {stamp: after[stamp] for stamp in before} == before
    with SyncPrefectClient(server) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[newest_run(client)])))
    again = [run for run in runs if run.run_count > 1]
    assert len(again) <= SLOTS
    assert (
        "artifacts damaged: 0 (now marked as missing), already missing: 1" in ray.distil("verify", server=server).err
    )  # the model, which `prepare` does not make
    assert here.distil("prepare", server=server).status == 0
    mine, theirs = (by_label(project.receipts(*KINDS)) for project in (ray, here))
    assert {one: receipt.files for one, receipt in mine.items()} == {one: r.files for one, r in theirs.items()}


def newest_run(client: SyncPrefectClient) -> UUID:
    (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run.id
