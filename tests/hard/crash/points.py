"""Defines a pipeline's crash points: before and after each write, fsync, rename, commit, checkpoint and MLflow call.

    DISTIL_CRASH_FOLDER   folder of this run; its file `points` records a line for each crash point that was passed
    DISTIL_CRASH_HOME     only files below this folder have crash points
    DISTIL_CRASH_AT       the crash point to kill at, as in that file; empty: only record
    DISTIL_CRASH_TARGET   `all`: kill the flow and all its descendants; `one`: kill only the process at the point

`hook/sitecustomize.py` calls `arm` in started processes, forked_commands.py in forked ones. The name of a crash
point consists of the operation, its file and a counter, so it is the same in every run of a pipeline that works
sequentially. Uses the standard library only, since it is imported before all other modules of a process.
"""

import fcntl
import functools
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER, HOME, AT, TARGET = "DISTIL_CRASH_FOLDER", "DISTIL_CRASH_HOME", "DISTIL_CRASH_AT", "DISTIL_CRASH_TARGET"
FLOW = "flow.pid"
"""Name of the file in the folder that contains the process id of the flow."""

MLFLOW = (
    "create_experiment",
    "create_run",
    "update_run",
    "set_terminated",
    "log_batch",
    "log_inputs",
    "log_dict",
    "log_artifact",
    "log_artifacts",
    "log_model_artifacts",
    "create_logged_model",
    "log_model_params",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "set_model_version_tag",
    "delete_model_version_tag",
)
CALLS: dict[str, Sequence[str]] = {
    "storage.store": ("Store.commit", "Store._write", "Store._remove", "Store.withdraw", "Store.drop_data"),
    "storage.arrow": ("ArrowWriter.write",),
    "tasks.train.checkpoint": ("save_file", "save_checkpoint"),
    "tasks.train.metrics": ("MetricsWriter._append", "MetricsWriter.cut_back"),
    "flows.pipeline.trainer_process": ("write_run",),
    "mlflow.tracking.client": [f"MlflowClient.{name}" for name in MLFLOW],
}
"""Functions to wrap, by module; they are wrapped once the module has been imported."""
CHANGING = (
    (re.compile(r"[0-9a-f]{16,}"), "*"),  # ids of MLflow, names of content
    (re.compile(r"work-\w+"), "work-*"),
    (re.compile(r"\.write-\w+"), ".write-*"),
    (re.compile(r"-\d{3,}$"), "-*"),
)
"""The parts of a name that differ between runs, and their replacements."""


def arm() -> None:
    """Wraps the functions of all modules that this process has imported or will import.

    Does nothing if DISTIL_CRASH_FOLDER is not set.
    """
    if FOLDER not in os.environ:
        return
    for name, which in (("fsync", 0), ("replace", 1), ("rename", 1), ("symlink", 1)):
        setattr(os, name, _wrapped_os(name, getattr(os, name), which))
    for module in CALLS.keys() & sys.modules.keys():
        _wrap(sys.modules[module])
    sys.meta_path.insert(0, _Finder())


def point(name: str) -> None:
    """Records a crash point, and kills the pipeline if it is the point DISTIL_CRASH_AT."""
    with open(Path(os.environ[FOLDER]) / "points", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = sum(line.rpartition(" #")[0] == name for line in file)
        here = f"{name} #{before + 1}"
        file.write(f"{here}\n")
        file.flush()
        if here == os.environ.get(AT):
            _kill()


def _kill() -> None:
    if os.environ.get(TARGET) == "all":
        import psutil

        flow = psutil.Process(int((Path(os.environ[FOLDER]) / FLOW).read_text(encoding="utf-8")))
        for process in (flow, *flow.children(recursive=True)):
            if process.pid != os.getpid():
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


# ---- wrapping ----------------------------------------------------------------------------------------------


def _around(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    """Wraps a function in two crash points; calls for which `name(*args)` is empty have none."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        what = name(*args)
        if not what:
            return function(*args, **kwargs)
        point(f"before {what}")
        result = function(*args, **kwargs)
        point(f"after {what}")
        return result

    return wrapped


def _wrapped_os(name: str, function: Callable[..., Any], which: int) -> Callable[..., Any]:
    def named(*args: Any) -> str:
        path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else os.fspath(args[which])
        home = os.environ[HOME]
        return f"{name} {steady(str(path)[len(home) + 1 :])}" if str(path).startswith(f"{home}/") else ""

    return _around(function, named)


def steady(text: str) -> str:
    """Replaces the parts of a name that differ between runs."""
    for pattern, instead in CHANGING:
        text = pattern.sub(instead, text)
    return text


def _wrap(module: ModuleType) -> None:
    for dotted in CALLS[module.__name__]:
        owner: Any = module
        *outer, last = dotted.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, _around(getattr(owner, last), functools.partial(_called, dotted)))


def _called(dotted: str, *args: Any) -> str:
    """Returns the function and, if its arguments show it, the file or kind: `Store._write receipts/shard/*.json`."""
    about = [arg for arg in args if isinstance(arg, str)][:1] if dotted.startswith("Store._") else []
    kinds = [str(arg.kind) for arg in args if hasattr(arg, "kind")][:1]
    return " ".join([dotted, *(steady(word) for word in about + kinds)])


class _Finder(importlib.abc.MetaPathFinder):
    """Loads a module of CALLS with its own loader, then wraps its functions."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in CALLS or fullname in self.busy:
            return None
        self.busy.add(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wrap(module: ModuleType) -> None:
                load(module)
                _wrap(module)

            spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec
