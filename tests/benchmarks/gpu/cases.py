"""The cases of a GPU session in order of worth, with time limit, purpose and prediction. Needs no torch.

    CASES["loss"].limit_seconds        # 60.0

Predictions come from arithmetic (memory traffic and FLOP per token against the rates of the GPU), made before any of
this had run on a GPU. They are written next to the results and are never an assertion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Range = tuple[float, float]


@dataclass(frozen=True)
class Prediction:
    """The range expected of one figure on each GPU, by a part of the GPU's name."""

    figure: str
    ranges: Mapping[str, Range]

    def as_json(self) -> dict[str, Any]:
        """Plain values for the case's line."""
        return {"figure": self.figure, **{gpu: list(limits) for gpu, limits in self.ranges.items()}}


@dataclass(frozen=True)
class Case:
    """One process of the session. `target` is module:function; it gets a Context and then `arguments`."""

    name: str
    limit_seconds: float
    target: str
    purpose: str
    arguments: tuple[Any, ...] = ()
    prediction: Prediction | None = None


def _speed(h200: Range, h100: Range) -> Prediction:
    return Prediction("tokens_per_second", {"H200": h200, "H100": h100})


def _case(name: str, limit: float, target: str, purpose: str, *arguments: Any, prediction: Any = None) -> Case:
    return Case(name, limit, f"tests.benchmarks.gpu.{target}", purpose, arguments, prediction)


_ALL = [
    _case("environment", 40, "hardware_cases:environment", "versions, GPU, attention kernels, disk and hash rates"),
    _case("peak-rates", 40, "hardware_cases:peak_rates", "rates that every other figure is measured against"),
    _case("parity", 90, "parity_case:parity", "loss and gradient on the GPU equal those in float32 on the CPU"),
    _case("smoke", 60, "train_cases:smoke", "a few eager steps from every source of targets"),
    _case(
        "train-cached-masked-256", 150, "train_cases:train", "the headline: training from cached targets",
        "cached", "masked", 256, prediction=_speed((0.98e6, 1.23e6), (0.86e6, 1.04e6)),
    ),
    _case("loss", 60, "loss_case:loss", "LM head and loss: chunk sizes, compiled chunk, fused kernel"),
    _case("attention", 45, "hardware_cases:attention", "attention kernels at the student's shapes"),
    _case(
        "capture-masked-512", 60, "capture_case:capture", "teacher over blocks, targets to disk",
        "masked", 512, prediction=_speed((2.2e6, 2.4e6), (2.0e6, 2.2e6)),
    ),
    _case("reference-64", 40, "train_cases:reference", "step of the reference trainer", 64),
    _case(
        "train-online-masked-256", 110, "train_cases:train", "training with the teacher in the loop",
        "online", "masked", 256, prediction=_speed((0.74e6, 0.74e6), (0.64e6, 0.64e6)),
    ),
    _case(
        "train-cached-all-256", 90, "train_cases:train", "loss on all positions",
        "cached", "all", 256, prediction=_speed((0.42e6, 0.42e6), (0.33e6, 0.33e6)),
    ),
    _case("train-cached-masked-512", 80, "train_cases:train", "larger batch", "cached", "masked", 512),
    _case("matrix-products", 40, "hardware_cases:matrix_products", "bf16 products at the student's shapes"),
    _case("capture-all-512", 60, "capture_case:capture", "targets of all positions", "all", 512),
    _case("train-cached-masked-128", 70, "train_cases:train", "smaller batch", "cached", "masked", 128),
    _case(
        "checkpoint", 40, "train_cases:checkpoint", "time for which a checkpoint stops the loop",
        prediction=Prediction("seconds_per_checkpoint", {"H200": (2.0, 5.0), "H100": (2.0, 5.0)}),
    ),
    _case("trainer-process", 80, "trainer_process_case:trainer_process", "real text through `python -m tasks.train`"),
    _case("train-cached-masked-1024", 70, "train_cases:train", "largest batch", "cached", "masked", 1024),
]  # fmt: skip

CASES: Mapping[str, Case] = {case.name: case for case in _ALL}
"""All cases by name, most valuable first."""
