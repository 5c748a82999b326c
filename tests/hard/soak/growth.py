"""Defines the resource measurements of the soak test (soak.py), their bounds of growth per run, and the verdict.

grown(samples)        # {"memory": 3.1}: growth per run of the measurements above their bounds
verdict(samples)      # the growth of all measurements, one line each
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bound:
    """The maximum growth of a measurement per run, and the reason; a single step of height `once` is allowed too."""

    limit: float
    unit: str
    reason: str
    once: float = 0.0

    def allowed(self, late: int) -> float:
        """Returns the allowed growth per run over `late` runs.

        A single step in their middle has a slope of 1.5 times its height, divided by the number of runs.
        """
        return self.limit + 1.5 * self.once / max(late, 1)


ONE_IN_TWENTY = 0.05
"""Limit for counts: one per twenty runs, so that one leak per complete pipeline (0.1 per run) is found."""
BOUNDS: Mapping[str, Bound] = {
    "memory": Bound(0.3, "MB", "500 runs may add 150 MB, a fifth of a flow process with torch and MLflow", 10),
    "files": Bound(ONE_IN_TWENTY, "", "a process may open 1024 files", 1),
    "threads": Bound(ONE_IN_TWENTY, "", "all threads of a run end with it"),
    "children": Bound(ONE_IN_TWENTY, "", "worker processes and trainers end with their run"),
    "temporary": Bound(
        ONE_IN_TWENTY, "", "files in TMPDIR and the store's scratch folder; folders in HOME/run without a training run"
    ),
    "prefect": Bound(400.0, "kB", "Prefect keeps states, logs and events of a run until their retention ends"),
    "wal": Bound(50.0, "kB", "Prefect's write-ahead log is reused; SQLite empties it at 4 MB", 4000),
    "mlflow": Bound(40.0, "kB", "every tenth run is a complete pipeline: three MLflow runs with parameters and curves"),
    "server memory": Bound(0.3, "MB", "as in a flow process; caches fill during the first hundred runs", 10),
    "server files": Bound(ONE_IN_TWENTY, "", "connections end with the flow; a pool of connections stays open", 2),
    "server threads": Bound(ONE_IN_TWENTY, "", "a thread pool fills to a fixed size", 2),
}


@dataclass(frozen=True)
class Sample:
    """The measurements after a run, by the names of BOUNDS and in their units."""

    number: int
    flow: str
    seconds: float
    figures: Mapping[str, float]


def late_of(values: Sequence[float]) -> Sequence[float]:
    """Returns the last two thirds of the values; during the first third, caches and pools fill."""
    return values[len(values) // 3 :]


def growth(values: Sequence[float]) -> float:
    """Returns the growth per run: the slope of a least-squares line through the late values."""
    late = late_of(values)
    return float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 1 else 0.0


def grown(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the growth per run of the measurements that grew more than their bounds."""
    found = {name: growth([one.figures[name] for one in samples]) for name in BOUNDS}
    late = len(late_of(range(len(samples))))
    return {name: value for name, value in found.items() if value > BOUNDS[name].allowed(late)}


def heading() -> str:
    """Returns the heading of the table."""
    return f"{'run':>5} {'seconds':>8} " + " ".join(f"{name:>14}" for name in BOUNDS)


def line_of(sample: Sample) -> str:
    """Returns one line of the table."""
    values = " ".join(f"{sample.figures[name]:>14,.1f}" for name in BOUNDS)
    return f"{sample.number:>5} {sample.seconds:>8.1f} {values}"


def verdict(samples: Sequence[Sample]) -> str:
    """Returns one line per measurement with its growth and its bound."""
    bad, late = grown(samples), len(late_of(range(len(samples))))
    lines = []
    for name, bound in BOUNDS.items():
        value = growth([one.figures[name] for one in samples])
        how = "GREW" if name in bad else "flat"
        lines.append(
            f"{how}  {name:<15} {value:>9.3f} of {bound.allowed(late):.3g} {bound.unit} per run: {bound.reason}"
        )
    return "\n".join(lines)
