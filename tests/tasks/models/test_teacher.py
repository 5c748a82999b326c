"""Loading a teacher: complete and frozen weights, and the errors of damaged folders."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from storage.errors import FatalError
from tasks.models.model_files import fingerprint_of, resolve_model
from tasks.models.teacher import load_teacher
from tasks.recipe.config import TeacherSettings
from tests.harness.tiny import rewrite_config


def settings_for(folder: Path, **changes) -> TeacherSettings:
    return TeacherSettings(model=str(folder), **changes)


def to_bin(folder: Path, **more) -> None:
    """Converts the weights to a .bin file."""
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_loads_in_evaluation_mode_without_gradients(folder):
    teacher = load_teacher(settings_for(folder), "cpu")
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert (teacher.width, teacher.vocab_size) == (32, teacher.vocabulary.size)
    assert (teacher.dtype, teacher.device.type) == (torch.float32, "cpu")
    assert teacher.fingerprint == fingerprint_of(settings_for(folder))
    assert load_teacher(settings_for(folder, dtype="bfloat16"), "cpu").model.dtype == torch.bfloat16
    eager = load_teacher(settings_for(folder, attention="eager"), "cpu")
    assert eager.model.config._attn_implementation == "eager"


# ---- weights -------------------------------------------------------------------------------------------------


def test_sharded_weights_load_and_a_missing_shard_fails(teacher_folder, folder):
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    complete, sharded = (
        load_teacher(settings_for(teacher_folder), "cpu").model,
        load_teacher(settings_for(folder), "cpu").model,
    )
    for one, other in zip(complete.state_dict().values(), sharded.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    next(folder.glob("model-*2-of-*.safetensors")).unlink()
    with pytest.raises(FatalError, match=r"model.safetensors.index.json lists model-00002-of-\d+.safetensors"):
        load_teacher(settings_for(folder), "cpu")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": "../../outside.safetensors"}}', '{"weight_map": [1]}'])
def test_an_index_may_only_name_files_of_its_own_folder(folder, content):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "must list files of its own folder" in error_of(folder)


def test_bin_weights_load(teacher_folder, folder):
    to_bin(folder)
    original, other = (
        load_teacher(settings_for(teacher_folder), "cpu").model,
        load_teacher(settings_for(folder), "cpu").model,
    )
    assert torch.equal(original.lm_head.dense.weight, other.lm_head.dense.weight)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_executed(folder, tmp_path):
    to_bin(folder, malicious=Malicious(tmp_path / "touched"))
    with pytest.raises(FatalError, match=r"pytorch_model.bin does not load"):
        load_teacher(settings_for(folder), "cpu")
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "touched")))  # noqa: S301  without the guard it does run
    assert (tmp_path / "touched").exists()


# ---- errors -------------------------------------------------------------------------------------------------


def error_of(folder: Path | str) -> str:
    with pytest.raises(FatalError) as caught:
        load_teacher(TeacherSettings(model=str(folder)), "cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_without_weights_fails_with_its_name(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors)" in error_of(folder)
    with pytest.raises(FatalError, match="has no weights"):
        fingerprint_of(settings_for(folder))


def test_a_folder_without_config_fails(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in error_of(folder)


def test_a_missing_folder_fails(tmp_path):
    assert "neither a local folder nor a Hugging Face Hub id" in error_of(tmp_path / "nowhere")
    with pytest.raises(FatalError, match="neither a local folder nor a Hugging Face Hub id"):
        resolve_model("")


def test_truncated_weights_fail(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors does not load as a masked language model" in error_of(folder)


def test_a_broken_config_fails(folder):
    (folder / "config.json").write_text('{"model_type": ')
    error_of(folder)
    rewrite = json.dumps({"model_type": "no-such-family"})
    (folder / "config.json").write_text(rewrite)
    assert "does not load as a masked language model" in error_of(folder)


def test_weights_of_another_shape_fail(folder):
    rewrite_config(folder, intermediate_size=48)
    assert "does not load as a masked language model" in error_of(folder)


def test_an_encoder_without_lm_head_fails(folder):
    AutoModelForMaskedLM.from_pretrained(folder).base_model.save_pretrained(folder)
    assert "the weights of lm_head" in error_of(folder)


def test_a_tokenizer_that_does_not_fit_fails(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size - 7)
    model.save_pretrained(folder)
    assert "tokens, but the model" in error_of(folder)


def test_a_missing_gpu_fails(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FatalError, match="this machine has no GPU"):
        load_teacher(settings_for(folder), "cuda")
