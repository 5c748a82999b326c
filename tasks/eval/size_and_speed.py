"""Measures the CPU latency, the parameter counts and the size on disk of models.

    models = {"student": load_model(folder), "teacher": load_model(other_folder)}
    times = latency(models, runs=30)
    counts = parameter_counts(models["student"].model)
    size = size_on_disk(folder)

All results are plain JSON values.
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

LATENCY_TOKENS = 128

WARM_UP_RUNS = 2
"""Untimed forward passes per model and batch size before the timed ones."""


def latency(
    models: Mapping[str, LoadedModel],
    batch_sizes: Sequence[int] = (1, 32),
    runs: int = 30,
    tokens: int = LATENCY_TOKENS,
    budget: float = 60.0,
) -> Scores:
    """Median milliseconds of one forward pass of each encoder on the CPU.

    {"tokens": 128, "threads": 2, "runs": {"1": 30, "32": 12}, "ms": {"student": {"1": 9.1, "32": 210.0}, ...}}

    Times the encoder without a head, since every fine-tuned model runs it, in float32 on rows of `tokens` tokens
    without padding. The models alternate run by run, so that other load on the machine affects all of them alike.
    A batch size ends after `runs` rounds, or after `budget` seconds once it has three rounds.
    """
    if runs == 0:
        return not_run("score.latency_runs is 0")
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
    """Seconds of each timed forward pass, by model."""
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
    """Random token ids [batch_size, length] without special tokens: models may treat padding differently."""
    size = min(int(loaded.model.config.vocab_size), len(loaded.tokenizer))
    ordinary = np.setdiff1d(np.arange(size), loaded.tokenizer.all_special_ids)
    return torch.from_numpy(np.random.default_rng(0).choice(ordinary, (batch_size, length)))


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the model with its LM head, and of the encoder alone.

    Tied weights count once, as part of the module that uses them first.
    """
    return {"with_head": _count(model), "without_head": _count(model.base_model)}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size_on_disk(folder: str | Path) -> int:
    """Bytes of the weight files in a model folder: the safetensors files, or the .bin files if it has none of those.

    FatalError if the folder holds neither.
    """
    for pattern in ("*.safetensors", "*.bin"):
        if sizes := [path.stat().st_size for path in Path(folder).glob(pattern)]:
            return sum(sizes)
    raise FatalError(f"{folder}: no weights (*.safetensors) in this folder; copy the model again", str(folder))
