"""The teacher's folder: its fingerprint, what is refused, and that what is loaded is whole and frozen."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from storage.error import FatalError
from tasks.config import Teacher
from tasks.teacher import fingerprint_of, load_teacher, resolve_model, scored_as
from tests.tiny import make_teacher


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "teacher"
    make_teacher(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def named(folder: Path, **changes) -> Teacher:
    return Teacher(model=str(folder), **changes)


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))


def to_bin(folder: Path, **more) -> None:
    """The same weights as a .bin file only."""
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_loads_in_evaluation_mode_without_gradients(folder):
    teacher = load_teacher(named(folder), "cpu")
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert (teacher.width, teacher.vocab_size) == (32, teacher.vocabulary.size)
    assert (teacher.dtype, teacher.device.type) == (torch.float32, "cpu")
    assert teacher.fingerprint == fingerprint_of(named(folder))
    assert load_teacher(named(folder, dtype="bfloat16"), "cpu").model.dtype == torch.bfloat16
    eager = load_teacher(named(folder, attention="eager"), "cpu")
    assert eager.model.config._attn_implementation == "eager"


# ---- fingerprint ---------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint_whoever_saved_it(original, folder):
    rewrite_config(folder, transformers_version="4.1.0", _name_or_path="elsewhere", dtype="float16")
    (folder / "README.md").write_text("a copy")
    assert fingerprint_of(named(folder)) == fingerprint_of(named(original))


def test_other_weights_and_another_config_have_another_fingerprint(original, folder):
    before = fingerprint_of(named(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = fingerprint_of(named(folder))
    rewrite_config(folder, layer_norm_eps=1e-3)
    assert len({before, changed, fingerprint_of(named(folder))}) == 3
    assert before == fingerprint_of(named(original))


def test_code_of_the_model_counts_only_where_it_may_run(folder):
    before = [fingerprint_of(named(folder, trust_remote_code=trust)) for trust in (False, True)]
    (folder / "modeling_own.py").write_text("x = 1\n")
    after = [fingerprint_of(named(folder, trust_remote_code=trust)) for trust in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_settings_of_a_run_are_not_part_of_the_fingerprint(folder):
    changed = named(folder, dtype="bfloat16", attention="eager", batch_rows=3)
    assert fingerprint_of(changed) == fingerprint_of(named(folder))


# ---- weights -------------------------------------------------------------------------------------------------


def test_weights_in_several_files(original, folder):
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole, parts = load_teacher(named(original), "cpu").model, load_teacher(named(folder), "cpu").model
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    next(folder.glob("model-*2-of-*.safetensors")).unlink()
    with pytest.raises(FatalError, match=r"model-00002-of-\d+.safetensors is in model.safetensors.index.json"):
        load_teacher(named(folder), "cpu")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": "../../outside.safetensors"}}', '{"weight_map": [1]}'])
def test_an_index_names_files_of_its_own_folder_only(folder, content):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "does not name files of its own folder" in refusal(folder)


def test_bin_weights_are_read(original, folder):
    to_bin(folder)
    whole, other = load_teacher(named(original), "cpu").model, load_teacher(named(folder), "cpu").model
    assert torch.equal(whole.lm_head.dense.weight, other.lm_head.dense.weight)


class Evil:
    """Would write a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_is_more_than_weights_is_refused_and_not_run(folder, tmp_path):
    to_bin(folder, evil=Evil(tmp_path / "touched"))
    with pytest.raises(FatalError, match=r"pytorch_model.bin does not load"):
        load_teacher(named(folder), "cpu")
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "touched")))  # noqa: S301  the bait works
    assert (tmp_path / "touched").exists()


# ---- refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path | str) -> str:
    with pytest.raises(FatalError) as caught:
        load_teacher(Teacher(model=str(folder)), "cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_without_weights_is_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors)" in refusal(folder)
    with pytest.raises(FatalError, match="has no weights"):
        fingerprint_of(named(folder))


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "there is no config.json" in refusal(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    with pytest.raises(FatalError, match="no such folder"):
        resolve_model("")


def test_cut_off_weights_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors does not load as a masked language model" in refusal(folder)


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": ')
    refusal(folder)
    rewrite = json.dumps({"model_type": "no-such-family"})
    (folder / "config.json").write_text(rewrite)
    assert "does not load as a masked language model" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder):
    rewrite_config(folder, intermediate_size=48)
    assert "does not load as a masked language model" in refusal(folder)


def test_an_encoder_without_lm_head_is_refused(folder):
    AutoModelForMaskedLM.from_pretrained(folder).base_model.save_pretrained(folder)
    assert "its weights lack lm_head" in refusal(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size - 7)
    model.save_pretrained(folder)
    assert "pieces but the model" in refusal(folder)


def test_a_gpu_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FatalError, match="there is no GPU here"):
        load_teacher(named(folder), "cuda")


def test_scores_of_a_model_are_named_by_its_tokenizer_too(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert scored_as(other) == scored_as(folder)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    definition = json.loads((changed / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (changed / "tokenizer.json").write_text(json.dumps(definition))
    assert fingerprint_of(named(changed)) == fingerprint_of(named(folder))
    assert scored_as(changed) != scored_as(folder)
