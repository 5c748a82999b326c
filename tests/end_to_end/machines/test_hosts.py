"""Training on two hosts through a launcher: two network namespaces that only a wire connects, as two machines are."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.project import Project, make_project, run_folder_of
from tests.harness.tiny import write_oscar

pytestmark = pytest.mark.slow

ADDRESSES = ("10.231.77.1", "10.231.77.2")
LAUNCHER = """
names=({names})
trap 'kill -TERM "${{pids[@]}}"' TERM
for rank in 0 1; do
  ip netns exec "${{names[$rank]}}" env GLOO_SOCKET_IFNAME=wire \\
    {python} -m torch.distributed.run --nnodes=2 --node-rank=$rank --nproc-per-node=1 \\
    --master-addr={first} --master-port=29400 --log-dir "$2/ranks/$rank" --redirects 3 -m tasks.train "$1" &
  pids+=($!)
done
status=0
for pid in "${{pids[@]}}"; do wait "$pid" || status=$?; done
exit $status
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a pair of virtual cards."""
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    name = uuid.uuid4().hex[:8]
    names = (f"{name}-0", f"{name}-1")
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for host, address in zip(names, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", host, "link", "set", "wire", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield names
    finally:
        for host in names:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def losses(project: Project) -> list[float]:
    lines = (run_folder_of(project) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_two_hosts_train_what_one_does(hosts: tuple[str, str], teacher: Path, tmp_path: Path, server: str) -> None:
    corpus = write_oscar(tmp_path / "corpus", parts=2)
    one, two = (make_project(tmp_path / name, corpus, teacher) for name in ("one", "two"))
    script = tmp_path / "launcher.sh"
    script.write_text(LAUNCHER.format(names=" ".join(hosts), python=sys.executable, first=ADDRESSES[0]))
    launcher = json.dumps(["bash", str(script), "{run}", "{folder}"])
    alone = one.distil("run", server=server)
    assert alone.status == 0, alone.err
    spread = two.distil("run", f"train.launcher={launcher}", server=server)
    assert spread.status == 0, spread.err

    assert (run_folder_of(two) / "ranks" / "1").is_dir()
    assert [r.key for r in two.receipts("model")] == [r.key for r in one.receipts("model")]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_launcher_that_fails_is_an_error_with_its_last_sentence(teacher: Path, tmp_path: Path, server: str) -> None:
    project = make_project(tmp_path, write_oscar(tmp_path / "corpus", parts=1), teacher)
    launcher = json.dumps(["bash", "-c", "echo no node is free >&2; exit 3", "{run}"])
    result = project.distil("run", f"train.launcher={launcher}", server=server)
    assert result.status == 1
    assert "training ended with status 3: no node is free" in result.err
