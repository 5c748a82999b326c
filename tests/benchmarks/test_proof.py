"""The proof at tiny size: teacher, one student and one control, scored, tabulated and plotted."""

import json
import shutil
from pathlib import Path

import pytest

from tests.benchmarks import proof
from tests.harness.eval_sets import write_ner
from tests.harness.tiny import save_tokenizer, write_oscar

TEACHER = """
extends = "{real}/teacher.toml"
corpus = {{ heldout_per_mille = 200, shard_bytes = 10_000 }}
blocks = {{ length = 32 }}
student.layers = 4
student.config = {{ hidden_size = 16, num_hidden_layers = 4, num_attention_heads = 2, intermediate_size = 32 }}
train = {{ max_steps = 8, batch_rows = 4, log_steps = 2, validate_steps = 4 }}
score = {{ heldout_rows = 16, latency_runs = 0 }}
"""
STUDENT = """
extends = "{real}/student.toml"
corpus = {{ pattern = "*", heldout_per_mille = 200, shard_bytes = 10_000 }}
blocks = {{ length = 32 }}
student = {{ layers = 2 }}
train = {{ max_steps = 8, batch_rows = 4, log_steps = 2, validate_steps = 4 }}
score = {{ heldout_rows = 16, latency_runs = 0 }}
"""
PROTOCOL = """
name = "tiny"
tuning = { lr = [1e-3], epochs = 1, batch_rows = 16, max_tokens = 32 }
sets = { ner = { path = "ner" } }
"""


@pytest.mark.slow
def test_one_command_writes_table_and_figures_and_a_second_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, results = tmp_path / "recipes", tmp_path / "results"
    shutil.copytree(proof.PROOF, recipes)
    for name, text in (("teacher", TEACHER), ("student", STUDENT)):
        (recipes / f"{name}.toml").write_text(text.format(real=proof.PROOF), encoding="utf-8")
    protocol = tmp_path / "protocol.toml"
    protocol.write_text(PROTOCOL, encoding="utf-8")
    monkeypatch.setattr(proof, "PROOF", recipes)
    monkeypatch.setattr(proof, "PROTOCOL", protocol)
    write_ner(tmp_path / "sets" / "ner")
    folders = [f"--corpus={write_oscar(tmp_path / 'corpus')}", f"--tokenizer={save_tokenizer(tmp_path / 'tokenizer')}"]
    arguments = [*folders, f"--sets={tmp_path / 'sets'}", f"--home={tmp_path / 'home'}", f"--results={results}"]
    proof.main([*arguments, "student-0", "control-0"])

    (record,) = results.glob("*-proof.json")
    found = json.loads(record.read_bytes())
    assert [row["model"] for row in found["rows"]] == ["teacher", "student", "control"]
    assert found["forecast"]["run"] == "student-0"
    for kind in ("teacher", "student", "control"):
        (training,) = found["trainings"][kind]
        assert 0 < training["heldout"]["top1"] < 1
        assert len(training["tuned"]["ner"]) == 3
    assert {"heldout", "ner"} <= set(found["student / teacher"])
    assert {path.name[-10:] for path in results.glob("*.png")} == {"scores.png", "curves.png"}

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home" / "store").rglob("*.json")}
    proof.main([*arguments, "--table", "student-0", "control-0"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "home" / "store").rglob("*.json")} == before
