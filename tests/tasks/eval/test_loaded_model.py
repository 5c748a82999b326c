"""Folders without a masked language model fail with their name."""

import pytest

from storage.errors import FatalError
from tasks.eval.loaded_model import load_model


def test_folder_without_a_model_fails(tmp_path):
    with pytest.raises(FatalError, match="no such model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(FatalError, match="has no masked language model"):
        load_model(tmp_path)
