"""Training needs torch, transformers, pyarrow, numpy, safetensors, pydantic, fsspec; it runs where nothing else is."""

import json
import subprocess
import sys
from pathlib import Path

from tests.harness.processes import LIMIT
from tests.harness.project import History, environment, run_folder_of

ABSENT = (
    "prefect", "mlflow", "datasets", "zstandard", "pandas", "sklearn", "rich", "typer", "pebble", "orjson",
    "accelerate", "seqeval", "matplotlib", "psutil", "flows",
)  # fmt: skip

BARE = f"""
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

# No other finder: that of an editable install would still find `flows`.
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Without]
for name in {ABSENT!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} is there")
sys.argv = ["tasks.train", sys.argv[1]]
runpy.run_module("tasks.train", run_name="__main__")
"""


def test_the_trainer_runs_bare_and_gives_the_same_model(history: History, tmp_path: Path) -> None:
    project = history.project.copy(tmp_path, without=("model", "checkpoint", "scores", "source", "shard"))
    run = json.loads((run_folder_of(history.project) / "run.json").read_text(encoding="utf-8"))
    run |= {"store": str(project.home / "store"), "folder": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "run.json")],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (ours,), (theirs,) = project.receipts("model"), history.project.receipts("model")
    assert {file.name: file.sha256 for file in ours.files if file.name == "model.safetensors"} == {
        file.name: file.sha256 for file in theirs.files if file.name == "model.safetensors"
    }
