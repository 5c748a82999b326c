"""The trainer as a process: a killed run resumes and ends with the same bits, on any number of ranks."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.loader.batch import MaskingRule, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.recipe.config import LossSettings, TrainSettings
from tasks.recipe.run_json import RunSpec, write_run
from tasks.tokens.vocabulary import load_vocabulary
from tasks.train.__main__ import main
from tasks.train.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint, steps_kept
from tasks.train.flops import training_work
from tasks.train.metrics import read_metrics
from tasks.train.process import StopSignal
from tasks.train.setup import set_up_training
from tasks.train.step import Ranks
from tasks.train.trainer import make_metrics_writer
from tasks.train.trainer import train as run_training
from tests.harness.processes import kill_tree
from tests.tasks.train.programs import recording_trainer
from tests.tasks.train.runs import REPO, STEPS, finish, run_of, start, wait_for_step, weights_of


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, dict[str, torch.Tensor]]:
    run = run_of(place, tmp_path_factory.mktemp("undisturbed"))
    return run, finish(run)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_reduces_its_loss_and_writes_model_metrics_and_result(
    undisturbed: tuple[RunSpec, dict[str, torch.Tensor]],
) -> None:
    run, _ = undisturbed
    lines = read_metrics(Path(run.folder) / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert [line["step"] for line in lines if "heldout_loss" in line] == [10, 20, 30]
    result = json.loads((Path(run.folder) / "result.json").read_text())
    assert Ref(**result["model"]) == run.model_ref
    store = Store(run.store)
    assert steps_kept(store, run) == [28, STEPS], "the newest two; none for the lowest held-out loss"
    assert (result["result"], result["step"]) == ("last", STEPS)


def test_bfloat16_on_a_cpu_has_its_own_run_key_and_stays_near_float32(
    undisturbed: tuple[RunSpec, dict[str, torch.Tensor]], place: Path, tmp_path: Path
) -> None:
    run = run_of(place, tmp_path, dtype="bfloat16")
    assert run.run_key != undisturbed[0].run_key
    weights = finish(run)
    losses, exact = (
        np.array([line["loss"] for line in read_metrics(Path(each.folder) / "metrics.jsonl") if "loss" in line])
        for each in (run, undisturbed[0])
    )
    assert not np.array_equal(losses, exact)
    np.testing.assert_allclose(losses, exact, rtol=0.02)
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_a_missing_result_file_is_written_again_for_a_finished_model(
    undisturbed: tuple[RunSpec, dict[str, torch.Tensor]],
) -> None:
    run, _ = undisturbed
    path = Path(run.folder) / "result.json"
    before = path.read_bytes()
    path.unlink()
    assert run_training(run, Ranks(), StopSignal())
    assert path.read_bytes() == before


def kill_and_resume(place: Path, home: Path, at_steps: list[int], ranks: int = 1) -> RunSpec:
    run = run_of(place, home)
    for step in at_steps:
        process = start(run, ranks)
        wait_for_step(run, process, step)
        kill_tree(process)
        process.communicate()
    finish(run, ranks)
    return run


def test_killed_and_resumed_ends_with_the_same_bits(
    place: Path, undisturbed: tuple[RunSpec, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = kill_and_resume(place, tmp_path, [3, 17])
    assert same(weights_of(run), undisturbed[1])
    steps = [line["step"] for line in read_metrics(Path(run.folder) / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_bit(
    place: Path, undisturbed: tuple[RunSpec, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    moments = sorted(random.Random(7).sample(range(1, STEPS), 10))
    assert same(weights_of(kill_and_resume(place, tmp_path, moments)), undisturbed[1])


@pytest.mark.guard
@pytest.mark.slow
def test_two_ranks_killed_and_resumed_on_two_end_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    undisturbed = finish(run_of(place, tmp_path / "undisturbed"), ranks=2)
    assert same(weights_of(kill_and_resume(place, tmp_path / "killed", [3, 17], ranks=2)), undisturbed)


def test_sigterm_writes_a_checkpoint_and_ends_with_143(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path, checkpoint_steps=1000, validate_steps=0)
    process = start(run)
    wait_for_step(run, process, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    (step,) = steps_kept(Store(run.store), run)
    assert 5 <= step < STEPS


def logits(run: RunSpec) -> torch.Tensor:
    """The logits of the finished model on a few rows of tokens."""
    store = Store(run.store)
    model = AutoModelForMaskedLM.from_pretrained(store.local_folder(store.receipt(run.model_ref))).eval()
    input_ids = torch.arange(4 * 16).view(4, 16) % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def test_two_ranks_end_like_one(
    place: Path, undisturbed: tuple[RunSpec, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Without dropout, at the default learning rate. The losses agree too, since counts are summed over ranks.

    Key biases are left out: they cancel in the softmax, so their gradient is rounding error, which AdamW turns into
    full-size steps whose direction depends on the processor. That the logits agree shows that they do not matter.
    """
    values = {"max_steps": 50, "batch_rows": 6, "lr": 5e-4}
    one, two = run_of(place, tmp_path / "one", **values), run_of(place, tmp_path / "two", **values)
    runs = [run.model_copy(update={"student": run.student.model_copy(update={"dropout": 0.0})}) for run in (one, two)]
    first, second = finish(runs[0]), finish(runs[1], ranks=2)
    for name in first:
        if not name.endswith("key.bias"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(runs[0]), logits(runs[1]), rtol=0, atol=1e-4)
    curves = [read_metrics(Path(run.folder) / "metrics.jsonl") for run in runs]
    assert curves[0][-2]["loss"] == pytest.approx(curves[1][-2]["loss"], rel=1e-4)


def test_two_ranks_killed_and_resumed_on_one_read_every_block_once(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path, max_steps=0, epochs=1.0, batch_rows=6, checkpoint_steps=5)
    process = start(run, ranks=2, trainer="tests.tasks.train.programs.recording_trainer")
    wait_for_step(run, process, 13)
    kill_tree(process)
    process.communicate()
    records = Path(run.folder) / recording_trainer.FILE
    first = [json.loads(line) for line in records.read_text().splitlines() if line.endswith("}")]
    records.unlink()
    finish(run, ranks=1, trainer="tests.tasks.train.programs.recording_trainer")
    second = [json.loads(line) for line in records.read_text().splitlines()]

    resumed = second[0]["step"] - 1
    assert resumed >= 10
    assert {line["rank"] for line in first} == {0, 1}
    kept = [*(line for line in first if line["step"] <= resumed), *second]
    seen = [row for line in sorted(kept, key=lambda line: (line["step"], line["rank"])) for row in line["rows"]]
    assert len(seen) == run.total_steps * 6
    masking = MaskingRule(load_vocabulary(run.teacher.model), run.mask, every_position=False)
    dataset = BlockDataset(Store(run.store), run.manifest, cached=False)
    wanted = []
    for number, part in enumerate(run.manifest):
        rows = np.arange(part.rows)
        batch = make_batch(dataset, masking, np.full_like(rows, number), rows, np.zeros_like(rows))
        wanted += recording_trainer.row_names(batch.input_ids)
    assert sorted(seen[: run.rows]) == sorted(wanted)
    assert len(set(wanted)) == run.rows


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_finds(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path, batch_rows=6, checkpoint_steps=5, validate_steps=0)
    process = start(run)
    wait_for_step(run, process, 13)
    process.kill()
    process.communicate()
    newest = steps_kept(Store(run.store), run)[-1]
    finish(run, ranks=2, trainer="tests.tasks.train.programs.lagging_trainer")
    records = [json.loads(line) for line in (Path(run.folder) / recording_trainer.FILE).read_text().splitlines()]
    for rank in (0, 1):
        assert [line["step"] for line in records if line["rank"] == rank] == list(range(newest + 1, STEPS + 1))


def test_a_loss_that_is_not_finite_ends_with_status_1_and_keeps_the_last_checkpoint(
    place: Path, tmp_path: Path
) -> None:
    run = run_of(place, tmp_path, lr=1.0, clip=0.0, warmup=0.0, batch_rows=2, max_steps=2000, checkpoint_steps=1)
    run = run.model_copy(update={"loss": LossSettings(temperature=1e-40)})  # no float32 holds a logit divided by it
    process = start(run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not finite at step" in errors
    assert "Traceback" not in errors
    store = Store(run.store)
    assert not store.has(run.model_ref)
    for step in steps_kept(store, run):
        folder = store.verified_folder(store.receipt(Ref("checkpoint", f"{run.run_key}-{step:09d}", "x")))
        assert all(torch.isfinite(value).all() for value in load_file(folder / "model.safetensors").values())


def test_a_damaged_checkpoint_is_skipped(
    place: Path, undisturbed: tuple[RunSpec, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run = run_of(place, tmp_path)
    process = start(run)
    wait_for_step(run, process, 13)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = Store(run.store)
    newest = steps_kept(store, run)[-1]
    path = (
        store.local_folder(store.receipt(Ref("checkpoint", f"{run.run_key}-{newest:09d}", "x")))
        / "optimizer.safetensors"
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert same(finish(run), undisturbed[1])


def test_a_trainer_continues_when_the_shell_that_started_it_exits(place: Path, tmp_path: Path) -> None:
    """As at logout, or after `nohup python -m tasks.train RUN.json &` in a script."""
    run = run_of(place, tmp_path, max_steps=300, validate_steps=0)
    command = [sys.executable, "-m", "tasks.train", str(write_run(run))]
    shell = '"$@" >errors 2>&1 & echo $!; while [ ! -s metrics.jsonl ]; do sleep 0.01; done'
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    started = subprocess.run(
        ["sh", "-c", shell, "sh", *command],
        env=environment | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=run.folder,
        timeout=120,
    )
    trainer = psutil.Process(int(started.stdout))
    assert not (Path(run.folder) / "result.json").exists(), "the trainer ended before the shell did"
    psutil.wait_procs([trainer], timeout=120)
    assert Store(run.store).has(run.model_ref), (Path(run.folder) / "errors").read_text()


def test_ranks_end_when_torchrun_is_killed(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path, max_steps=1_000_000, checkpoint_steps=1_000_000, validate_steps=0)
    process = start(run, ranks=2)
    wait_for_step(run, process, 3)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(ranks, timeout=60)
    for rank in left:
        rank.kill()
    assert left == []


def test_train_imports_neither_prefect_nor_mlflow() -> None:
    code = "import tasks.train, sys; print(sorted({'prefect', 'mlflow', 'datasets'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO, timeout=120
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("total", [1, 10, 100])
def test_schedules_start_low_and_end_near_zero(total: int) -> None:
    from tasks.train.optimizer import lr_factor

    for train in (TrainSettings(schedule="linear"), TrainSettings(schedule="wsd")):
        factors = [lr_factor(step, total, train) for step in range(total)]
        assert all(0 < factor <= 1 for factor in factors)
        assert max(factors) == 1
        assert factors[-1] <= max(1 / max(1, total * 0.2), 1 / total) + 1e-9


def test_a_full_gpu_is_one_sentence_that_names_the_setting(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSecond line")

    monkeypatch.setattr("tasks.train.trainer.gradient_step", full)
    run = run_of(place, tmp_path, micro_rows=3)
    assert main([str(write_run(run))]) == 1
    message = capsys.readouterr().err
    assert "3 blocks of 32 tokens in one forward pass exceed the memory of the GPU; lower train.micro_rows" in message
    assert "Second line" not in message


def test_on_a_gpu_the_metrics_have_mfu(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cpu = run_of(place, tmp_path), torch.device("cpu")
    setup = set_up_training(run, Store(run.store), cpu)
    monkeypatch.setattr("tasks.train.trainer.matrix_rate", lambda device: 1e12)
    writer = make_metrics_writer(run, setup, torch.device("cuda"), Ranks(0, 2))
    online = setup.signal_source.teacher.model  # type: ignore[attr-defined]
    assert writer.work == training_work(setup.student, run.blocks.length, run.loss, online, online=True)
    assert writer.rate == 2e12
    assert make_metrics_writer(run, setup, cpu, Ranks()).work is None


def test_checkpoints_that_cannot_be_read_now_are_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = run_of(place, tmp_path), Store(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    student = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    for step in (4, 8):
        save_checkpoint(store, run, student, optimizer, TrainingProgress(step=step))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    elsewhere = Store(store.root, cache=tmp_path / "full")
    monkeypatch.setattr("storage.store.download_file", full)
    with pytest.raises(FatalError, match="full"):
        load_checkpoint(elsewhere, run, student, optimizer)
    assert steps_kept(store, run) == [4, 8]
    monkeypatch.undo()
    assert load_checkpoint(elsewhere, run, student, optimizer).step == 8
