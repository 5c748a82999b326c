"""The trainer as a child process: its command, its error message, its time to stop, its metrics file."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline.task_policy import GRACE_SECONDS
from flows.pipeline.trainer_process import Tail, command, launch_trainer
from storage.errors import FatalError, RetryableError
from storage.fingerprint import sha256_bytes
from tasks.recipe.config import (
    BlockSettings,
    LossSettings,
    MaskSettings,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
    TrainSettings,
)
from tasks.recipe.run_json import Part, RunSpec


def a_run(folder: Path, **train: Any) -> RunSpec:
    key = sha256_bytes(b"run")
    return RunSpec(
        run_key=key,
        name="tiny",
        store=str(folder / "store"),
        folder=str(folder / "run"),
        blocks=BlockSettings(),
        mask=MaskSettings(),
        teacher=TeacherSettings(model=str(folder / "no-such-teacher")),
        targets=TargetSettings(),
        student=StudentSettings(),
        loss=LossSettings(),
        train=TrainSettings(**train),
        teacher_fingerprint=key,
        manifest=(Part(label="a", blocks=key, rows=4, tokens=4),),
    )


def test_several_ranks_go_through_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert "torch.distributed.run" not in command(a_run(tmp_path), path)
    parts = command(a_run(tmp_path, ranks=2), path)
    assert parts[1:3] == ["-m", "torch.distributed.run"]
    assert parts[-3:] == ["-m", "tasks.train", str(path)]
    assert parts[parts.index("--nproc-per-node") + 1] == "2"


def test_the_last_line_of_the_trainer_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="no-such-teacher"):
        launch_trainer(a_run(tmp_path), lambda lines, final: None)


def test_a_store_that_does_not_answer_is_a_retryable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        unused_port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run = a_run(tmp_path).model_copy(update={"store": "s3://bucket/store"})
    with pytest.raises(RetryableError, match="the store s3://bucket/store did not respond"):
        launch_trainer(run, lambda lines, final: None)


def test_the_launcher_gets_the_grace_period_of_the_trainer_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    code = "import os; print(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']); exit(1)"
    run = a_run(tmp_path, launcher=(sys.executable, "-c", code, "{run}"))
    with pytest.raises(FatalError, match=rf": {GRACE_SECONDS:.0f} \(log"):
        launch_trainer(run, lambda lines, final: None)


def test_only_new_lines_are_followed_until_the_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.lines() == [{"step": 1}, {"step": 2}]
    assert tail.lines() == []
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.lines() == [{"step": 3}]
    fresh = path.with_suffix(".new")
    fresh.write_text('{"step": 1}\n')
    fresh.replace(path)
    assert tail.lines() == [{"step": 1}]
