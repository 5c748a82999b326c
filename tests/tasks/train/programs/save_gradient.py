"""A program for tests: saves the gradient of one step over all ranks.

    torchrun --nproc-per-node 2 -m tests.tasks.train.programs.save_gradient STORE TEACHER PARTS.json OUT.safetensors

Started by test_step.py, which compares the gradient of one rank with that of two.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from storage.store import Store
from tasks.loader.batch import MaskingRule, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.models.student import make_student
from tasks.models.teacher import load_teacher
from tasks.recipe.config import LossSettings, MaskSettings, TeacherSettings
from tasks.recipe.run_json import Part
from tasks.train.__main__ import exit_with_status
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import OnlineTeacher

ROWS = 8


def main(store: str, teacher_folder: str, parts_file: str, out: str) -> int:
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    parts = tuple(Part(**values) for values in json.loads(Path(parts_file).read_text()))
    teacher = load_teacher(TeacherSettings(model=teacher_folder), "cpu")
    student = make_student(teacher.model, teacher.vocabulary, layers=2)
    # Rank 0 takes full blocks and rank 1 padded ones, so their counts differ.
    rows = np.array([*range(ROWS // 2), *(parts[0].rows - 1 - n for n in range(ROWS // 2))])
    own = np.array_split(rows, ranks.world_size)[ranks.rank]
    masking = MaskingRule(teacher.vocabulary, MaskSettings(), every_position=False)
    zeros = np.zeros(len(own), np.int64)
    batch = make_batch(BlockDataset(Store(store), parts, cached=False), masking, zeros, own, zeros)
    student_with_loss = DistributedDataParallel(StudentWithLoss(student, LossSettings(), compile_encoder=False))
    gradient_step(
        student_with_loss,
        OnlineTeacher(teacher, LossSettings()),
        [batch],
        sum_counts([batch], False, ranks),
        ranks,
        None,
    )
    if ranks.rank == 0:
        save_file({name: p.grad for name, p in student.named_parameters() if p.grad is not None}, out)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "WORLD_SIZE" in os.environ, "start it with torchrun"
    exit_with_status(lambda: main(*sys.argv[1:]))
