"""Checks that no untrusted data is unpickled.

A complete run must succeed although only the modules in PIPES, which read data of its own processes, may unpickle.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import LIMIT
from tests.harness.project import REPO, environment, make_project
from tests.harness.tiny import make_teacher, write_oscar

GUARD = REPO / "tests" / "hard" / "guard"
PIPES = {
    "multiprocessing": "pipes of the standard library to worker processes of the run",
    "docket": "background tasks of Prefect's server in its own memory",
}
PACKAGES = ("storage", "tasks", "flows")


@pytest.mark.guard
@pytest.mark.slow
def test_a_whole_run_unpickles_nothing_but_what_its_own_processes_send_each_other(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    write_oscar(tmp_path / "corpus", parts=2)
    project = make_project(tmp_path / "project", tmp_path / "corpus", tmp_path / "teacher")
    seen = tmp_path / "unpickled"
    guarded = environment(project.folder, "") | {
        "PYTHONPATH": f"{GUARD}{os.pathsep}{REPO}",
        "DISTIL_UNPICKLED": str(seen),
        "DISTIL_MAY_UNPICKLE": ",".join(PIPES),
    }
    command = [sys.executable, "-m", "flows.cli", "run", str(project.recipe)]
    done = subprocess.run(
        command, cwd=tmp_path, env=guarded, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    asked = set(seen.read_text(encoding="utf-8").split())
    assert done.returncode == 0, (asked, done.stderr)
    assert any(name.startswith("multiprocessing") for name in asked), "the guard was not loaded"
    assert [name for name in asked if not name.startswith(tuple(PIPES))] == []


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_sources_load_only_what_cannot_run_code(package: str) -> None:
    loaders = ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.full_load", "yaml.unsafe_load")
    executors = ("eval", "exec", "marshal.loads", "shelve.open", "joblib.load")
    calls = [(path, call) for path in sorted((REPO / package).rglob("*.py")) for call in calls_of(path)]
    assert len(calls) > 50
    assert [f"{path}: {name_of(call)}" for path, call in calls if name_of(call) in (*loaders, *executors)] == []
    unsafe = [
        f"{path}:{call.lineno}"
        for path, call in calls
        if name_of(call) in ("torch.load", "load_state_dict_from_url")
        and {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") != "True"
    ]
    assert unsafe == []
    trusting = [
        f"{path}:{call.lineno}"
        for path, call in calls
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "True"
    ]
    assert trusting == []


def test_the_guard_refuses(tmp_path: Path) -> None:
    code = "import pickle; pickle.loads(pickle.dumps(1))"
    guarded = os.environ | {
        "PYTHONPATH": str(GUARD),
        "DISTIL_UNPICKLED": str(tmp_path / "seen"),
        "DISTIL_MAY_UNPICKLE": "multiprocessing",
    }
    done = subprocess.run([sys.executable, "-c", code], env=guarded, capture_output=True, text=True, check=False)
    assert "RuntimeError: __main__ unpickles" in done.stderr
