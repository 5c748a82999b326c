"""A truncated source, and a run that is killed while it trains: what is whole stays, the same command goes on."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def receipts(place: Path, kind: str) -> set[tuple[str, int]]:
    folder = place / ".distil" / "store" / "receipts" / kind
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.receipt.json")}


def test_a_truncated_source_fails_alone_and_is_made_when_mended(distil, place: Path) -> None:
    plain = place / "corpus" / "fr_meta_part_2.jsonl"
    packed = plain.with_name(plain.name + ".gz")
    whole = gzip.compress(plain.read_bytes())
    plain.unlink()
    packed.write_bytes(whole[: len(whole) // 2])
    failed = distil("prepare", "tiny.toml")
    assert failed.returncode == 1
    assert "fr_meta_part_2" in failed.stdout
    assert "cut short" in failed.stderr
    assert "Traceback" not in failed.stderr
    status = json.loads(distil("status", "tiny.toml", "--json").stdout)
    assert list(status["source"]["failed"]) == ["fr_meta_part_2"]
    assert status["targets"]["done"] == status["targets"]["wanted"] == 2
    kinds = ("source", "shard", "blocks", "targets")
    before = {kind: receipts(place, kind) for kind in kinds}
    packed.write_bytes(whole)
    mended = distil("prepare", "tiny.toml")
    assert mended.returncode == 0, mended.stderr
    for kind in kinds:
        assert before[kind] < receipts(place, kind), kind
    assert len(receipts(place, "targets")) == 3


def test_a_killed_run_leaves_no_trainer_and_goes_on_as_one_curve(
    distil, place: Path, environment: dict[str, str]
) -> None:
    arguments = ("run", "tiny.toml", "train.max_steps=1200", "train.checkpoint_steps=50")
    parent = subprocess.Popen([sys.executable, "-m", "flows.cli", *arguments], cwd=place, env=environment)
    metrics = lambda: list((place / ".distil" / "run").glob("*/metrics.jsonl"))  # noqa: E731
    wait_for(lambda: metrics() and '"step": 100,' in metrics()[0].read_text())
    children = list(below(parent.pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(lives(pid) for pid in children))
    done = distil(*arguments)
    assert done.returncode == 0, done.stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/.distil/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("distil")
    trainings = client.search_runs([experiment.experiment_id], "tags.`distil.part` = 'train'")
    assert len(trainings) == 1
    steps = [metric.step for metric in client.get_metric_history(trainings[0].info.run_id, "loss")]
    # The trainer's last checkpoint, when its parent died, ends a line of its own: one more point on the same curve.
    assert steps == sorted(set(steps))
    assert set(range(5, 1201, 5)) <= set(steps)
    assert len(steps) <= 241


def below(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from below(int(child))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it did not happen within four minutes"
        time.sleep(0.1)
