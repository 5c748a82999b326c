"""Lost and damaged artifacts are named, and `distil retry` rebuilds them and nothing else."""

import shutil
from pathlib import Path

from storage import layout
from storage.arrow import TARGETS_FILE
from storage.verify import verify
from tests.harness.output import refusal
from tests.harness.project import History, Shell, new_artifacts


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lines_of(text: str, word: str) -> list[str]:
    """Lines that begin with a word, without it."""
    return [line.removeprefix(word).strip() for line in text.splitlines() if line.startswith(word)]


def test_lost_and_damaged_targets_are_named_and_only_they_are_rebuilt(
    history: History, shell: Shell, tmp_path: Path
) -> None:
    project = history.project.copy(tmp_path)
    store = project.store
    receipts = sorted(project.receipts("targets"), key=lambda receipt: receipt.label)
    without_data, without_receipt, damaged = receipts[0], receipts[1], receipts[-1]
    shutil.rmtree(store.path(layout.key_folder("targets", without_data.key)))
    Path(store.path(layout.receipt_path("targets", without_receipt.key))).unlink()

    status = shell("status", project.recipe)
    assert status.status == 0
    assert lines_of(status.out, "missing") == [f"targets {one.label}" for one in (without_data, without_receipt)]

    flip_a_byte(store.local_folder(damaged) / TARGETS_FILE)
    checked = shell("verify", project.recipe)
    assert "artifacts damaged: 2 (now marked as missing), already missing: 1" in refusal(checked)
    assert lines_of(checked.out, "missing") == [f"targets {without_receipt.label}"]
    named = [line.split(":")[0] for line in lines_of(checked.out, "damaged")]
    assert sorted(named) == sorted(f"targets {one.label}" for one in (without_data, damaged))
    assert store.missing([receipt.ref for receipt in receipts]) == [
        one.ref for one in (without_data, without_receipt, damaged)
    ]

    before = project.creation_times()
    retried = shell("retry", project.recipe)
    assert retried.status == 0, retried.err
    assert new_artifacts(before, project.creation_times()) == {
        ("targets", one.label) for one in (without_data, without_receipt, damaged)
    }
    assert [store.receipt(one.ref).files for one in receipts] == [one.files for one in receipts]
    assert verify(store) == []


def test_a_retry_of_what_is_done_does_nothing(history: History, shell: Shell, tmp_path: Path) -> None:
    project = history.project.copy(tmp_path)
    before = project.creation_times()
    result = shell("retry", project.recipe, "--stage", "targets", "--shard", project.receipts("targets")[0].label)
    assert result.status == 0, result.err
    assert "nothing to do" in result.out
    assert project.creation_times() == before
