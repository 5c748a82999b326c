"""The inputs of a case, and the file of the figures it has recorded so far.

    context.record("tokens_per_second", 1.1e6)

A figure is on disk at once, so a case that is killed later keeps it.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Context:
    """One case in its own process: device, size, folders and results.

    `device` is "cuda", or "cpu" in a tiny session. `out` receives the session's files, `work` holds blocks and targets
    that later cases reuse, `partial` is the file of the figures recorded so far.
    """

    device: str
    out: Path
    work: Path
    partial: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        """Whether the case only shows that it runs, with a small model on the CPU."""
        return self.device == "cpu"

    def record(self, name: str, value: Any) -> None:
        """Keeps one figure: plain JSON values, also nested."""
        self.results[name] = value
        print(f"{name}: {value}", flush=True)
        temporary = self.partial.with_suffix(".new")
        temporary.write_text(json.dumps(self.results), encoding="utf-8")
        os.replace(temporary, self.partial)
