"""Case of the trainer as a process: the demo's text through targets on the device and `python -m tasks.train`.

The only case with real text, a saved teacher, checkpoints, validation and the committed model.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import METRICS, make_run, write_run
from tasks.targets.calibration import calibrate
from tasks.targets.compute import make_targets, open_capture
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.results import CORPUS, REPO, TEACHER
from tests.benchmarks.synthetic import Bench, real_bench


def trainer_process(context: Context) -> None:
    """Seconds, exit status, last lines of metrics and the probe of the targets. RuntimeError if the trainer fails."""
    bench = real_bench(context.work / "demo", TEACHER, CORPUS, length=128, layers=2)
    settings = (bench.store, TeacherSettings(model=str(TEACHER)), bench.teacher.vocabulary, MaskSettings())
    uncalibrated = open_capture(*settings, TargetSettings(), device=context.device)
    calibration = calibrate(bench.store, [bench.blocks[0].ref], uncalibrated)
    capture = open_capture(*settings, TargetSettings(), calibration=calibration.ref, device=context.device)
    receipts = [make_targets(bench.store, blocks.ref, capture) for blocks in bench.blocks]
    context.record("targets_probe", receipts[0].info["probe"])
    recipe = make_recipe(_values(context, bench), "benchmark")
    part = bench.parts[0].model_copy(update={"targets": (receipts[0].key,)})
    fingerprint = capture.teacher.fingerprint
    run = make_run(
        recipe, manifest=(part,), heldout=bench.parts[1:], teacher_fingerprint=fingerprint, start="", counts=""
    )
    start = time.perf_counter()
    command = [sys.executable, "-m", "tasks.train", str(write_run(run))]
    status = subprocess.run(command, cwd=REPO, check=False).returncode
    context.record("trainer_seconds", time.perf_counter() - start)
    if status != 0:
        raise RuntimeError(f"python -m tasks.train ended with status {status}")
    lines = (Path(run.folder) / METRICS).read_text(encoding="utf-8").splitlines()
    context.record("last_lines", [json.loads(line) for line in lines[-6:]])


def _values(context: Context, bench: Bench) -> dict[str, Any]:
    steps = 4 if context.tiny else 200
    return {
        "name": "gpu",
        "home": str(context.work / "home"),
        "store": bench.store.root,
        "corpus": {"url": "unused"},
        "blocks": {"length": 128},
        "teacher": {"model": str(TEACHER)},
        "student": {"layers": 2},
        "train": {
            "batch_rows": 32,
            "max_steps": steps,
            "checkpoint_steps": steps // 2,
            "validate_steps": steps // 2,
            "log_steps": max(2, steps // 10),
            "device": context.device,
        },
    }
