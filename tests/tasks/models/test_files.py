"""The files of a model folder: what its fingerprint holds and what it leaves out."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tasks.models.files import fingerprint_of, model_content_key
from tasks.recipe.config import TeacherSettings
from tests.harness.tiny import rewrite_config


def named(folder: Path, **changes) -> TeacherSettings:
    return TeacherSettings(model=str(folder), **changes)


def test_a_copy_has_the_same_fingerprint_whoever_saved_it(teacher_folder, folder):
    rewrite_config(folder, transformers_version="4.1.0", _name_or_path="elsewhere", dtype="float16")
    (folder / "README.md").write_text("a copy")
    assert fingerprint_of(named(folder)) == fingerprint_of(named(teacher_folder))


def test_other_weights_and_another_config_have_another_fingerprint(teacher_folder, folder):
    before = fingerprint_of(named(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = fingerprint_of(named(folder))
    rewrite_config(folder, layer_norm_eps=1e-3)
    assert len({before, changed, fingerprint_of(named(folder))}) == 3
    assert before == fingerprint_of(named(teacher_folder))


def test_code_of_the_model_counts_only_where_it_may_run(folder):
    before = [fingerprint_of(named(folder, trust_remote_code=trust)) for trust in (False, True)]
    (folder / "modeling_own.py").write_text("x = 1\n")
    after = [fingerprint_of(named(folder, trust_remote_code=trust)) for trust in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_settings_of_a_run_are_not_part_of_the_fingerprint(folder):
    changed = named(folder, dtype="bfloat16", attention="eager", batch_rows=3)
    assert fingerprint_of(changed) == fingerprint_of(named(folder))


def test_scores_of_a_model_are_named_by_its_tokenizer_too(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert model_content_key(other) == model_content_key(folder)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    definition = json.loads((changed / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (changed / "tokenizer.json").write_text(json.dumps(definition))
    assert fingerprint_of(named(changed)) == fingerprint_of(named(folder))
    assert model_content_key(changed) != model_content_key(folder)
