"""The fingerprint of a model folder: what changes it and what does not."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tasks.models.model_files import fingerprint_of, model_content_key
from tasks.recipe.config import TeacherSettings
from tests.harness.tiny import rewrite_config


def settings_for(folder: Path, **changes) -> TeacherSettings:
    return TeacherSettings(model=str(folder), **changes)


def test_a_copy_saved_elsewhere_has_the_same_fingerprint(teacher_folder, folder):
    rewrite_config(folder, transformers_version="4.1.0", _name_or_path="elsewhere", dtype="float16")
    (folder / "README.md").write_text("a copy")
    assert fingerprint_of(settings_for(folder)) == fingerprint_of(settings_for(teacher_folder))


def test_weights_and_config_change_the_fingerprint(teacher_folder, folder):
    before = fingerprint_of(settings_for(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = fingerprint_of(settings_for(folder))
    rewrite_config(folder, layer_norm_eps=1e-3)
    assert len({before, changed, fingerprint_of(settings_for(folder))}) == 3
    assert before == fingerprint_of(settings_for(teacher_folder))


def test_model_code_changes_the_fingerprint_only_if_it_may_run(folder):
    before = [fingerprint_of(settings_for(folder, trust_remote_code=trust)) for trust in (False, True)]
    (folder / "modeling_own.py").write_text("x = 1\n")
    after = [fingerprint_of(settings_for(folder, trust_remote_code=trust)) for trust in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_runtime_settings_do_not_change_the_fingerprint(folder):
    changed = settings_for(folder, dtype="bfloat16", attention="eager", batch_rows=3)
    assert fingerprint_of(changed) == fingerprint_of(settings_for(folder))


def test_the_content_key_depends_on_the_tokenizer(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert model_content_key(other) == model_content_key(folder)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    definition = json.loads((changed / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (changed / "tokenizer.json").write_text(json.dumps(definition))
    assert fingerprint_of(settings_for(changed)) == fingerprint_of(settings_for(folder))
    assert model_content_key(changed) != model_content_key(folder)
