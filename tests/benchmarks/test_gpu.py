"""The GPU session on a CPU: one line per case whatever happens to it, every case at tiny size, and the table.

No test here checks a speed.
"""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.cases import CASES, Case
from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.report import read_lines
from tests.benchmarks.gpu.session import run_session
from tests.benchmarks.results import REPO

THROUGHPUT = [name for name in CASES if name.startswith(("train-", "capture-", "reference-"))]
ABSENT = (
    "flows", "prefect", "mlflow", "ray", "datasets", "pandas", "zstandard", "sklearn", "scipy", "matplotlib", "psutil",
    "accelerate", "seqeval", "rich", "typer", "pebble",
)  # fmt: skip
"""Packages that the trainer, and so a bare GPU machine, does without."""
WITHOUT = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Without]
"""
"""Hides those packages from a Python process."""


def end(context: Context) -> None:
    """A case that records a figure and ends well."""
    context.record("figure", 1.0)


def fail(context: Context) -> None:
    """A case that records a figure and then fails."""
    context.record("figure", 1.0)
    raise ValueError("made to fail")


def hang(context: Context) -> None:
    """A case that starts a process and waits for it; neither ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.record("child", child.pid)
    child.wait()


def own_case(name: str, limit: float) -> Case:
    """A case whose function is the one of that name in this file."""
    return Case(name, limit, f"tests.benchmarks.test_gpu:{name}", "test of the session")


def test_a_failing_and_a_hanging_case_leave_a_line_and_the_session_ends(tmp_path: Path) -> None:
    cases = [own_case("fail", 30), own_case("hang", 1.5), own_case("end", 30)]
    lines = run_session(cases, out=tmp_path / "out", work=tmp_path / "work", seconds=120, device="cpu")
    assert read_lines(tmp_path / "out") == lines
    failed, hung, ended = lines
    assert failed["status"] == "failed: ValueError: made to fail"
    assert failed["results"]["figure"] == 1.0
    assert "Traceback" in failed["log"]
    assert hung["status"].startswith("timed out")
    assert not is_running(hung["results"]["child"])
    assert ended["status"] == "ok"


def is_running(process: int) -> bool:
    """Whether a process exists and has not ended; a zombie has."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def test_a_session_out_of_time_skips_the_remaining_cases(tmp_path: Path) -> None:
    start = time.monotonic()
    lines = run_session(list(CASES.values()), out=tmp_path, work=tmp_path, seconds=1, device="cpu")
    assert time.monotonic() - start < 5
    assert [(line["case"], line["status"]) for line in lines] == [(name, "skipped: no time left") for name in CASES]


def test_a_tiny_session_of_two_cases_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["peak-rates", "environment"]
    assert main(["--tiny", "--cases", *names, "--out", str(tmp_path / "out")]) == 0
    lines = read_lines(tmp_path / "out")
    assert [(line["case"], line["status"]) for line in lines] == [(name, "ok") for name in names]
    assert lines[0]["results"]["matrix_tflops"] > 0
    main(["--publish", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
    (table,), (record,) = (list((tmp_path / "results").glob(f"*-gpu-tiny.{kind}")) for kind in ("md", "json"))
    text = table.read_text(encoding="utf-8")
    assert "| peak-rates | ok |" in text
    assert "copy tb per second" in text
    assert text in capsys.readouterr().out
    assert json.loads(record.read_bytes())["lines"] == lines


def test_the_table_shows_the_prediction_next_to_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prediction = CASES["train-cached-masked-256"].prediction
    assert prediction
    line: dict[str, Any] = {"case": "train-cached-masked-256", "time": "2026-01-01T00:00:00+00:00", "device": "cuda"}
    figures = {"hardware": "H200", "tokens_per_second": 1e6, "mfu": 0.4}
    line |= {"status": "ok", "seconds": 9.0, "prediction": prediction.as_json(), "results": figures}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    main(["--publish", str(tmp_path), "--results", str(tmp_path)])
    row = "| train-cached-masked-256 | ok | 9 | 1,000,000 | H200 980,000 to 1,230,000 | 0.4 | - | - |"
    assert row in capsys.readouterr().out
    assert (tmp_path / "2026-01-01-h200-gpu.md").exists()


@pytest.mark.slow
def test_the_session_needs_only_the_packages_of_the_trainer() -> None:
    targets = sorted({case.target.split(":")[0] for case in CASES.values()})
    code = f"{WITHOUT}\nimport tests.benchmarks.gpu.__main__, {', '.join(targets)}"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False, stderr=subprocess.PIPE, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_loss_case_runs_the_fused_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's arithmetic in torch, since triton may be absent: checks everything but the kernel itself."""
    from tests.benchmarks.gpu.loss_case import loss

    kernel = ModuleType("tests.benchmarks.gpu.kernel")
    kernel.fused_kl_cross_entropy = kernel_in_torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    context = Context("cpu", tmp_path, tmp_path, tmp_path / "partial.json")
    loss(context)
    differences = context.results["fused kernel, torch.float32, relative difference"]
    assert set(differences) == {"kl", "cross_entropy", "gradient"}
    assert max(differences.values()) < 1e-5
    trained, fused = (context.results[name] for name in ("as trained", "fused kernel, float32 logits"))
    assert fused["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert fused["gradient_norms"] == pytest.approx(trained["gradient_norms"], rel=1e-3)


def kernel_in_torch(
    student_nV: Any, teacher_nV: Any, labels_n: Any, valid_n: Any, distil: Any, mlm: Any, temperature: float
) -> tuple[Any, Any]:
    """The contract of tests.benchmarks.gpu.kernel.fused_kl_cross_entropy, by autograd."""
    import torch
    from torch.nn import functional as F

    with torch.enable_grad():
        logits_nV = student_nV.detach().float().requires_grad_()
        log_p_nV = F.log_softmax(teacher_nV.float() / temperature, -1)
        log_q_nV = F.log_softmax(logits_nV / temperature, -1)
        kl_n = (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1) * valid_n
        entropy_n = F.cross_entropy(logits_nV, labels_n, reduction="none") * valid_n
        (gradient_nV,) = torch.autograd.grad((distil * kl_n + mlm * entropy_n).sum(), logits_nV)
    student_nV.copy_(gradient_nV)
    return kl_n.detach(), entropy_n.detach()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_at_tiny_size(name: str, work: Path, tmp_path: Path) -> None:
    case = CASES[name]
    module, function = case.target.split(":")
    context = Context("cpu", tmp_path, work, tmp_path / "partial.json")
    getattr(import_module(module), function)(context, *case.arguments)
    assert json.loads(context.partial.read_bytes()) == context.results
    if name in THROUGHPUT:
        assert context.results["tokens_per_second"] > 0
        assert context.results["mfu"] > 0
        assert ("data_wait" in context.results) == name.startswith("train-")
