"""One optimizer step: its gradient does not depend on the number of micro-batches or ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storage.store import Store
from tasks.loader.batch import Batch, MaskingRule, make_batch, step_ranges
from tasks.loader.dataset import BlockDataset
from tasks.models.student import make_student
from tasks.models.teacher import TeacherModel, load_teacher
from tasks.recipe.config import LossSettings, MaskSettings, TeacherSettings
from tasks.recipe.run_json import Part
from tasks.train.step import Ranks, StepCounts, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import OnlineTeacher
from tests.harness.tiny import make_parts, make_teacher

ROWS = 8

Material = tuple[Store, TeacherModel, tuple[Part, ...]]
"""A store with the blocks of the parts, and a teacher."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("step")
    make_teacher(folder / "teacher")
    store = Store(folder / "store")
    parts = make_parts(store, folder / "teacher")
    return store, load_teacher(TeacherSettings(model=str(folder / "teacher")), "cpu"), parts


def batches_of(material: Material, pieces: int, every_position: bool) -> list[Batch]:
    store, teacher, parts = material
    # The last block of each part is padded, so splits have unequal numbers of positions.
    part = np.array([0, 1] * (ROWS // 2))
    row = np.array([parts[p].rows - 1 - i // 2 for i, p in enumerate(part)])
    masking = MaskingRule(teacher.vocabulary, MaskSettings(), every_position)
    dataset = BlockDataset(store, parts, cached=False)
    return [
        make_batch(dataset, masking, part[chosen], row[chosen], np.zeros(len(chosen), np.int64))
        for chosen in np.array_split(np.arange(ROWS), pieces)
    ]


def gradient(material: Material, batches: list[Batch], loss: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    _, teacher, _ = material
    student = make_student(teacher.model, teacher.vocabulary, layers=2)
    student_with_loss = StudentWithLoss(student, loss, compile_encoder=False)
    step_counts = sum_counts(batches, False, Ranks())
    losses = gradient_step(student_with_loss, OnlineTeacher(teacher, loss), batches, step_counts, Ranks(), None)
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]), losses


@pytest.mark.parametrize("every_position", [False, True])
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_splitting_a_step_does_not_change_the_gradient(material: Material, pieces: int, every_position: bool) -> None:
    whole, loss_whole = gradient(material, batches_of(material, 1, every_position), LossSettings())
    split, loss_split = gradient(material, batches_of(material, pieces, every_position), LossSettings())
    assert (whole - split).norm() / whole.norm() <= 1e-6
    torch.testing.assert_close(loss_split, loss_whole, rtol=1e-5, atol=1e-6)


def test_two_gloo_ranks_give_the_gradient_of_one(material: Material, tmp_path: Path, repo: Path) -> None:
    store, teacher, parts = material
    (tmp_path / "parts.json").write_text(json.dumps([part.model_dump() for part in parts]))
    gradients = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.safetensors"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [store.root, teacher.settings.model, str(tmp_path / "parts.json"), str(out)]
        environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*torchrun, "-m", "tests.tasks.train.programs.save_gradient", *arguments],
            check=True,
            cwd=tmp_path,
            env=environment,
            timeout=240,
        )
        gradients.append(torch.cat([value.flatten() for _, value in sorted(load_file(out).items())]))
    one, two = gradients
    assert (one - two).norm() / one.norm() <= 1e-6


def test_counts_do_not_depend_on_micro_batches(material: Material) -> None:
    one, four = batches_of(material, 1, False), batches_of(material, 4, False)
    expected = sum_counts(one, False, Ranks())
    assert sum_counts(four, False, Ranks()) == expected
    assert expected == StepCounts(int(one[0].valid.sum()), int((one[0].labels != -100).sum()), one[0].tokens, False)


def test_all_positions_carry_loss_only_where_attended(
    material: Material,
) -> None:
    (batch,) = batches_of(material, 1, True)
    assert batch.positions is None
    assert batch.attention_mask is not None
    assert torch.equal(batch.valid, batch.attention_mask)
    assert batch.selected == batch.tokens > batch.masked > 0


@pytest.mark.parametrize(("rows", "ranks", "micro"), [(8, 1, 0), (8, 2, 3), (7, 3, 2), (16, 4, 1)])
def test_ranks_and_micro_batches_take_every_row_once(rows: int, ranks: int, micro: int) -> None:
    steps = 3
    plans = [list(step_ranges(1, 1 + steps, rows, micro, rank, ranks)) for rank in range(ranks)]
    for step in range(steps):
        taken = [row for plan in plans for span in plan[step] for row in span]
        assert sorted(taken) == list(range((1 + step) * rows, (2 + step) * rows))
    assert all(len(span) <= (micro or rows) for plan in plans for spans in plan for span in spans)
