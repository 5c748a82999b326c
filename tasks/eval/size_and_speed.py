"""Measures the CPU latency, the parameter counts and the size on disk of models.

    models = {"student": load_model(folder), "teacher": load_model(other_folder)}
    times = latency(models, runs=30)
    counts = parameter_counts(models["student"].model)
    size = size_on_disk(folder)

All results contain plain JSON values only.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from storage.errors import FatalError
from tasks.eval.loaded_model import LoadedModel, eval_mode
from tasks.eval.scores import Scores, not_run
from tasks.models.forward import longest_input

LATENCY_BATCHES, LATENCY_TOKENS = (1, 32), 128
"""Batch sizes, and tokens per sequence."""

LATENCY_SECONDS = 60.0
"""Longest time of the measurement, for all models together."""

WARM_UP_RUNS = 2
"""Untimed forward passes per model and batch size before the timed passes."""


def latency(
    models: Mapping[str, LoadedModel],
    batch_sizes: Sequence[int] = LATENCY_BATCHES,
    runs: int = 30,
    tokens: int = LATENCY_TOKENS,
    budget: float = LATENCY_SECONDS,
) -> Scores:
    """Measures the median time of one forward pass of each encoder on the CPU, in milliseconds.

    {"tokens": 128, "threads": 2, "runs": {"1": 30, "32": 12}, "ms": {"student": {"1": 9.1, "32": 210.0}, ...}}

    Runs the encoder without a head, which all fine-tuned models share, in float32 on rows of `tokens` tokens without
    padding. The models alternate, so that other load on the machine affects all of them equally. For each batch size,
    timing ends after `runs` rounds, or after `budget` seconds and at least three rounds. Returns a `not_run` value if
    `runs` is 0.
    """
    if runs == 0:
        return not_run("score.latency_runs is 0; set it to measure the latency")
    length = min([tokens, *(longest_input(loaded.model) for loaded in models.values())])
    devices = {name: loaded.model.device for name, loaded in models.items()}
    scores: Scores = {
        "tokens": length,
        "threads": torch.get_num_threads(),
        "runs": {},
        "ms": {name: {} for name in models},
    }
    for loaded in models.values():
        nn.Module.to(loaded.model, "cpu")
    encoders = {name: loaded.model.base_model for name, loaded in models.items()}
    try:
        with eval_mode(*(loaded.model for loaded in models.values())):
            for batch_size in batch_sizes:
                inputs = {name: _random_ids(models[name], batch_size, length) for name in models}
                times = _time_alternating(encoders, inputs, runs, budget)
                scores["runs"][str(batch_size)] = len(next(iter(times.values()), []))
                for name, seconds in times.items():
                    scores["ms"][name][str(batch_size)] = 1000 * median(seconds)
    finally:
        for name, loaded in models.items():
            nn.Module.to(loaded.model, devices[name])
    return scores


@torch.inference_mode()
def _time_alternating(
    encoders: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], runs: int, budget: float
) -> dict[str, list[float]]:
    """Returns the seconds of each timed forward pass, by model."""
    for name, encoder in encoders.items():
        for _ in range(WARM_UP_RUNS):
            encoder(input_ids=inputs[name])
    times: dict[str, list[float]] = {name: [] for name in encoders}
    begin = time.perf_counter()
    for number in range(runs):
        if number >= min(3, runs) and time.perf_counter() - begin > budget:
            break
        for name, encoder in encoders.items():
            start = time.perf_counter()
            encoder(input_ids=inputs[name])
            times[name].append(time.perf_counter() - start)
    return times


def _random_ids(loaded: LoadedModel, batch_size: int, length: int) -> Tensor:
    """Returns random token ids [batch_size, length] without special tokens, since models may skip padding."""
    size = min(int(loaded.model.config.vocab_size), len(loaded.tokenizer))
    ordinary = np.setdiff1d(np.arange(size), loaded.tokenizer.all_special_ids)
    return torch.from_numpy(np.random.default_rng(0).choice(ordinary, (batch_size, length)))


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Counts the parameters of the model with its LM head, and of the encoder alone.

    Tied weights are counted once.
    """
    return {"with_head": _count(model), "without_head": _count(model.base_model)}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size_on_disk(folder: str | Path) -> int:
    """Returns the bytes of the weight files in a model folder: its safetensors files, or if it has none its .bin files.

    FatalError if the folder contains neither.
    """
    for pattern in ("*.safetensors", "*.bin"):
        if sizes := [path.stat().st_size for path in Path(folder).glob(pattern)]:
            return sum(sizes)
    raise FatalError(f"{folder}: contains no weights (*.safetensors or *.bin); copy the model again", str(folder))
