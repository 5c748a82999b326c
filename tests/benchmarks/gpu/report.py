"""Turns the lines of GPU sessions into one Markdown table and its JSON, named by date and hardware of the sessions.

    publish_sessions([Path("build/gpu")], RESULTS)

Several folders make one table: a second session may repeat a case, and then both lines are shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.cases import CASES
from tests.benchmarks.gpu.session import RESULTS_FILE
from tests.benchmarks.results import Report, markdown, write_files

NOTES = """
Models have the size of camembert-base (12 layers to 6, blocks of 512 tokens) with random weights, since speed does not
depend on them. A case is one process. Throughput counts all tokens of the blocks. Training is the loop of tasks.train
with its loader, without checkpoints; the lines of metrics that contain compilation and profiling are left out. MFU is
the arithmetic that the case needs over the bf16 matrix rate measured in the same process. data wait is the share of
time in which the loop waits for data. peak gb is the most memory that torch allocated. Predictions were made by
arithmetic before the first run on a GPU. Numbers of a tiny session only show that the cases run.
"""


@dataclass(frozen=True)
class Row:
    """One case of one session; None: not measured, or the case has no such figure."""

    case: str
    status: str
    seconds: float | None
    tokens_per_second: float | None
    predicted: str | None
    mfu: float | None
    data_wait: float | None
    peak_gb: float | None


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of one session, in the order in which they were written."""
    return [json.loads(line) for line in (folder / RESULTS_FILE).read_text(encoding="utf-8").splitlines()]


def publish_sessions(folders: Sequence[Path], results: Path) -> Path:
    """Writes and prints the table; returns the path of the Markdown file."""
    lines = [line for folder in folders for line in read_lines(folder)]
    hardware = next((line["results"]["hardware"] for line in lines if line.get("results")), "unknown hardware")
    date = lines[0]["time"][:10]
    tiny = lines[0]["device"] == "cpu"
    facts = {"date": date, "hardware": hardware} | _versions(lines)
    title = "GPU session, tiny: shows that the cases run" if tiny else "GPU session"
    report = Report("gpu", title, facts, [row_of(line) for line in lines])
    text = "\n".join([markdown(report), *(_details(line) for line in lines), NOTES.strip(), ""])
    print(text, flush=True)
    return write_files(results, f"{date}-{hardware}-{'gpu-tiny' if tiny else 'gpu'}", text, {**facts, "lines": lines})


def row_of(line: Mapping[str, Any]) -> Row:
    """One line as a row of the table."""
    found = line.get("results", {})
    figures = {name: found.get(name) for name in ("tokens_per_second", "mfu", "data_wait", "peak_gb")}
    return Row(line["case"], line["status"], line.get("seconds"), predicted=_prediction(line), **figures)


def _versions(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Versions of the packages that the speed depends on, where the case `environment` ran."""
    packages: Mapping[str, str] = next(
        (found["packages"] for line in lines if "packages" in (found := line.get("results", {}))), {}
    )
    names = [name for name in ("torch", "transformers", "triton") if name in packages]
    return {"versions": ", ".join(f"{name} {packages[name]}" for name in names)} if names else {}


def _prediction(line: Mapping[str, Any]) -> str | None:
    """The predicted range for this GPU, for every known GPU where this one is not among them."""
    prediction = dict(line.get("prediction", {}))
    figure = prediction.pop("figure", None)
    if figure is None:
        return None
    hardware = line.get("results", {}).get("hardware", "")
    own = {gpu: limits for gpu, limits in prediction.items() if gpu in hardware}
    texts = [f"{gpu} {_range(limits)}" for gpu, limits in (own or prediction).items()]
    return ", ".join(texts) + ("" if figure == "tokens_per_second" else f" {figure.replace('_', ' ')}")


def _range(limits: Sequence[float]) -> str:
    low, high = (f"{limit:,.0f}" for limit in limits)
    return low if low == high else f"{low} to {high}"


def _details(line: Mapping[str, Any]) -> str:
    """Everything a case recorded, one figure per line."""
    case = CASES.get(line["case"])
    text = [f"## {line['case']}", "", *([f"{case.purpose[:1].upper()}{case.purpose[1:]}.", ""] if case else [])]
    text += [f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in line.get("results", {}).items()]
    return "\n".join([*text, ""])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(inner) for inner in value)
    return str(value)
