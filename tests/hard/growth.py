"""The figures that a soak (soak.py) measures after each run, the growth per run that each may have, and the verdict.

grown(samples)        # {"memory": 3.1}: figures that grew more than they may, per run
verdict(samples)      # all figures, one line each
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bound:
    """The most that a figure may grow per run, and the reason; `once` is allowed a single time, in any run."""

    limit: float
    unit: str
    reason: str
    once: float = 0.0

    def allowed(self, late: int) -> float:
        """Allowed growth per run over `late` runs: a single step in their middle has a slope of 1.5 of its height."""
        return self.limit + 1.5 * self.once / max(late, 1)


ONE_IN_TWENTY = 0.05
"""For counts: fewer than one left per twenty runs, so one left by each chain (0.1 per run) is found."""
BOUNDS: Mapping[str, Bound] = {
    "memory": Bound(0.3, "MB", "500 runs may take 150 MB, a fifth of a flow process with torch and MLflow", 10),
    "files": Bound(ONE_IN_TWENTY, "", "1024 is what a process may open", 1),
    "threads": Bound(ONE_IN_TWENTY, "", "all threads of a run end with it"),
    "children": Bound(ONE_IN_TWENTY, "", "worker processes and trainers end with their run"),
    "temporary": Bound(
        ONE_IN_TWENTY, "", "in TMPDIR, the store's scratch, leases aside, and HOME/run but for trainings"
    ),
    "prefect": Bound(400.0, "kB", "states, logs and events of a run, until retention"),
    "wal": Bound(50.0, "kB", "Prefect's log of writes is used again and again; SQLite empties it at 4 MB", 4000),
    "mlflow": Bound(40.0, "kB", "a tenth of a chain: three runs with their parameters, curves and tags"),
    "server memory": Bound(0.3, "MB", "as a flow process; its caches fill during the first hundred runs", 10),
    "server files": Bound(ONE_IN_TWENTY, "", "connections end with the flow; a pool of them stays open", 2),
    "server threads": Bound(ONE_IN_TWENTY, "", "a pool that fills to a fixed size", 2),
}


@dataclass(frozen=True)
class Sample:
    """The figures after a run, by the names of BOUNDS and in their units."""

    number: int
    flow: str
    seconds: float
    figures: Mapping[str, float]


def late_of(values: Sequence[float]) -> Sequence[float]:
    """The last two thirds: during the first, caches and pools fill."""
    return values[len(values) // 3 :]


def growth(values: Sequence[float]) -> float:
    """Growth per run: the slope of the line through the late values."""
    late = late_of(values)
    return float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 1 else 0.0


def grown(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth per run of the figures that grew more than they may."""
    found = {name: growth([one.figures[name] for one in samples]) for name in BOUNDS}
    late = len(late_of(range(len(samples))))
    return {name: value for name, value in found.items() if value > BOUNDS[name].allowed(late)}


def heading() -> str:
    """Above the table."""
    return f"{'run':>5} {'seconds':>8} " + " ".join(f"{name:>14}" for name in BOUNDS)


def line_of(sample: Sample) -> str:
    """A line of the table."""
    values = " ".join(f"{sample.figures[name]:>14,.1f}" for name in BOUNDS)
    return f"{sample.number:>5} {sample.seconds:>8.1f} {values}"


def verdict(samples: Sequence[Sample]) -> str:
    """Each figure with its growth and bound."""
    bad, late = grown(samples), len(late_of(range(len(samples))))
    lines = []
    for name, bound in BOUNDS.items():
        value = growth([one.figures[name] for one in samples])
        how = "GREW" if name in bad else "flat"
        lines.append(
            f"{how}  {name:<15} {value:>9.3f} of {bound.allowed(late):.3g} {bound.unit} per run: {bound.reason}"
        )
    return "\n".join(lines)
