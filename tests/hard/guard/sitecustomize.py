"""Records every module that unpickles, and rejects it unless it is allowed; loaded from PYTHONPATH, for tests only.

The names of the modules are written to the file DISTIL_UNPICKLED. DISTIL_MAY_UNPICKLE is a comma-separated list of the
modules and packages that may unpickle.
"""

import os
import pickle
import sys
from typing import Any

MAY = tuple(os.environ["DISTIL_MAY_UNPICKLE"].split(","))


def _guard() -> None:
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "") in (__name__, "pickle"):
        frame = frame.f_back
    asked = frame.f_globals.get("__name__", "") if frame else ""
    with open(os.environ["DISTIL_UNPICKLED"], "a", encoding="utf-8") as file:
        file.write(f"{asked}\n")
    if not any(asked == name or asked.startswith(f"{name}.") for name in MAY):
        raise RuntimeError(f"{asked} unpickles, but is not in DISTIL_MAY_UNPICKLE")


def _guarded(real: Any) -> Any:
    def call(*given: Any, **named: Any) -> Any:
        _guard()
        return real(*given, **named)

    return call


class Unpickler(pickle.Unpickler):
    """The standard Unpickler with the check."""

    def load(self) -> Any:
        _guard()
        return super().load()


pickle.load, pickle.loads = _guarded(pickle.load), _guarded(pickle.loads)
pickle.Unpickler = Unpickler  # type: ignore[misc]
