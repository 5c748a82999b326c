"""Two tiny models with different tokenizers."""

import pytest
import torch

from tasks.eval.loaded_model import load_model
from tests.harness.tiny import make_teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "student", "modernbert", layers=2)
    make_teacher(folder / "teacher", "camembert", layers=3)
    return {name: load_model(folder / name) for name in ("student", "teacher")}
