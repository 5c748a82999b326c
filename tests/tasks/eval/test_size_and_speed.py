"""Latency with alternating models, parameter counts, and bytes of weights."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, CamembertConfig

from storage.errors import FatalError
from tasks.eval.size_and_speed import latency, parameter_counts, size_on_disk


def test_latency_alternates_models_and_reports_every_batch_size(models):
    order = []
    hooks = [
        loaded.model.base_model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: order.append((name, tuple(inputs["input_ids"].shape))), with_kwargs=True
        )
        for name, loaded in models.items()
    ]
    found = latency(models, batch_sizes=(1, 3), runs=4, tokens=16)
    for hook in hooks:
        hook.remove()
    timed = [call for call in order if call[1] == (3, 16)][4:]  # after two warm-up passes of each model
    assert timed == [("student", (3, 16)), ("teacher", (3, 16))] * 4
    assert found["runs"] == {"1": 4, "3": 4}
    assert all(found["ms"][name][size] > 0 for name in models for size in ("1", "3"))


def test_latency_stops_at_its_budget_after_three_rounds(models):
    assert latency(models, batch_sizes=(1,), runs=50, tokens=8, budget=0.0)["runs"] == {"1": 3}
    assert latency(models, runs=0)["status"] == "not run"


def test_parameter_counts_equal_the_published_ones():
    """camembert-base, and a student with six of its layers."""
    published = {12: (110_655_493, 110_031_360), 6: (68_128_261, 67_504_128)}
    for layers, counts in published.items():
        config = CamembertConfig(
            vocab_size=32_005, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1
        )
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config)
        assert tuple(parameter_counts(model).values()) == counts


def test_size_is_that_of_the_weight_files(models):
    folder = models["student"].folder
    assert size_on_disk(folder) == (folder / "model.safetensors").stat().st_size
    with pytest.raises(FatalError, match="no weights"):
        size_on_disk(folder.parent)
