"""Points where a chain can be killed, in every process of it: before and after each write, fsync, rename, receipt,
checkpoint and call of MLflow.

    DISTIL_CRASH_FOLDER   folder of this life; its file `points` gets a line for each point that was passed
    DISTIL_CRASH_HOME     only files below this folder are looked at
    DISTIL_CRASH_AT       the point to kill at, as that file names it; empty: only count
    DISTIL_CRASH_WHOM     `all`: the flow's process and all that it started; `one`: only the process that got there

`hook/sitecustomize.py` calls `arm` in processes that are started, nursery.py in the one that is forked. A point is
named by what is done to what, and how often that was done in this life, so it is the same one in every life of a chain
that works on one thing at a time. Standard library only, since it comes before all else in a process.
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

FOLDER, HOME, AT, WHOM = "DISTIL_CRASH_FOLDER", "DISTIL_CRASH_HOME", "DISTIL_CRASH_AT", "DISTIL_CRASH_WHOM"
FLOW = "flow.pid"
"""In the folder: the process id of the flow."""

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
"""Functions by their module, wrapped when it has been imported."""
CHANGING = (
    (re.compile(r"[0-9a-f]{16,}"), "*"),  # ids of MLflow, names of content
    (re.compile(r"work-\w+"), "work-*"),
    (re.compile(r"\.write-\w+"), ".write-*"),
    (re.compile(r"-\d{3,}$"), "-*"),
)
"""The parts of a name that differ from life to life."""


def arm() -> None:
    """Wraps what this process has imported already and all that it will import. Does nothing without a folder."""
    if FOLDER not in os.environ:
        return
    for name, which in (("fsync", 0), ("replace", 1), ("rename", 1), ("symlink", 1)):
        setattr(os, name, _wrapped_os(name, getattr(os, name), which))
    for module in CALLS.keys() & sys.modules.keys():
        _wrap(sys.modules[module])
    sys.meta_path.insert(0, _Finder())


def point(name: str) -> None:
    """Notes that the chain got here, and kills if it is the place to die."""
    with open(Path(os.environ[FOLDER]) / "points", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = sum(line.rpartition(" #")[0] == name for line in file)
        here = f"{name} #{before + 1}"
        file.write(f"{here}\n")
        file.flush()
        if here == os.environ.get(AT):
            _strike()


def _strike() -> None:
    if os.environ.get(WHOM) == "all":
        import psutil

        flow = psutil.Process(int((Path(os.environ[FOLDER]) / FLOW).read_text(encoding="utf-8")))
        for process in (flow, *flow.children(recursive=True)):
            if process.pid != os.getpid():
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


# ---- wrapping ----------------------------------------------------------------------------------------------


def _around(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    """`function` between two points; `name(*args)` is empty for a call that is none."""

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
    """A name without what differs from life to life."""
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
    """`Store._write receipts/shard/*.receipt.json`: the function, and what it is about where its arguments tell."""
    about = [arg for arg in args if isinstance(arg, str)][:1] if dotted.startswith("Store._") else []
    kinds = [str(arg.kind) for arg in args if hasattr(arg, "kind")][:1]
    return " ".join([dotted, *(steady(word) for word in about + kinds)])


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module of CALLS be loaded as it is, then wraps it."""

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
