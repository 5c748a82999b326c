"""Set-up of a training: tokenizer, weights and dtypes, and errors before the first step."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from storage.errors import FatalError
from storage.store import Store
from tasks.models.model_files import fingerprint_of
from tasks.models.teacher import load_teacher
from tasks.recipe.config import TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import RunSpec, make_run
from tasks.train.setup import set_up_training
from tasks.train.teacher_signal import OnlineTeacher
from tests.harness.tiny import make_parts, make_teacher, save_tokenizer

CPU = torch.device("cpu")
FRESH = {
    "model_type": "roberta",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 130,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, another model of the same class for warm starts, and a store of blocks."""
    folder = tmp_path_factory.mktemp("build")
    make_teacher(folder / "teacher")
    make_teacher(folder / "other", layers=3)
    make_parts(Store(folder / "store"), folder / "teacher", shards=1, texts=4)
    return folder


def run_of(place: Path, start: str = "", **sections: dict[str, object]) -> RunSpec:
    values = {
        "name": "tiny",
        "home": str(place),
        "store": str(place / "store"),
        "corpus": {"url": "unused"},
        "teacher": {"model": str(place / "teacher")},
        "blocks": {"length": 32},
        "targets": {"source": "online"},
        "student": {"layers": 2},
    }
    recipe = make_recipe({name: values.get(name, {}) for name in sections} | values | sections, "test")
    parts = make_parts(Store(place / "store"), place / "teacher", shards=1, texts=4)
    fingerprint = fingerprint_of(recipe.teacher)
    return make_run(recipe, manifest=parts, heldout=(), teacher_fingerprint=fingerprint, start=start, counts="")


def student_of(run: RunSpec) -> torch.nn.Module:
    return set_up_training(run, Store(run.store), CPU).student


@pytest.mark.parametrize("family", ["camembert", "modernbert"])
def test_one_load_gives_a_float32_student_and_a_bfloat16_teacher(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student has the file's float32 weights; the teacher gives the bits of one that was loaded in bfloat16."""
    make_teacher(tmp_path / "teacher", family)
    settings = TeacherSettings(model=str(tmp_path / "teacher"), dtype="bfloat16")
    loaded = load_teacher(settings, "cpu")
    loads = []
    monkeypatch.setattr("tasks.train.setup.load_teacher", lambda *given: loads.append(given) or load_teacher(*given))
    make_parts(Store(tmp_path / "store"), tmp_path / "teacher", shards=1, texts=4)
    setup = set_up_training(
        run_of(tmp_path, teacher=settings.model_dump(), student={"layers": 4}), Store(tmp_path / "store"), CPU
    )
    assert len(loads) == 1

    saved = load_file(tmp_path / "teacher" / "model.safetensors")
    student = setup.student.state_dict()
    assert {tensor.dtype for tensor in student.values()} == {torch.float32}
    assert all(torch.equal(student[name], value) for name, value in saved.items())

    assert isinstance(setup.signal_source, OnlineTeacher)
    teacher = setup.signal_source.teacher
    assert (teacher.dtype, teacher.settings, teacher.device) == (loaded.dtype, loaded.settings, loaded.device)
    for (name, ours), (other, theirs) in zip(all_tensors(teacher.model), all_tensors(loaded.model), strict=True):
        assert name == other
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    ids = torch.arange(5, 37)[None]
    assert torch.equal(teacher.model(ids).logits, loaded.model(ids).logits)


def all_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_a_tokenizer_that_does_not_fit_the_online_teacher_is_refused(place: Path, tmp_path: Path) -> None:
    saved = AutoModelForMaskedLM.from_pretrained(place / "teacher")
    saved.resize_token_embeddings(saved.config.vocab_size + 300)
    saved.save_pretrained(tmp_path / "large")
    save_tokenizer(tmp_path / "large")
    run = run_of(place, teacher={"model": str(place / "teacher")})
    own = run.model_copy(update={"teacher": run.teacher.model_copy(update={"model": str(tmp_path / "large")})})
    with pytest.raises(FatalError, match=r"set blocks\.tokenizer"):
        student_of(own.model_copy(update={"teacher_fingerprint": fingerprint_of(own.teacher)}))


@pytest.mark.parametrize(
    ("config", "field"),
    [({"hidden_size": 16}, r"loss\.cosine"), ({"hidden_size": 32, "vocab_size": 0}, r"student\.config\.vocab_size")],
)
def test_a_fresh_student_of_another_shape_is_refused(place: Path, config: dict[str, int], field: str) -> None:
    teacher_rows = load_file(place / "teacher" / "model.safetensors")["lm_head.bias"].shape[0]
    if "vocab_size" in config:
        config = config | {"vocab_size": teacher_rows - 1}
    with pytest.raises(FatalError, match=field):
        student_of(run_of(place, student={"init": "config", "layers": 1, "config": FRESH | config}))


def test_a_warm_start_takes_weights_from_its_folder_and_dropout_from_the_recipe(place: Path) -> None:
    run = run_of(place, student={"layers": 2, "dropout": 0.25}, train={"warm_start": str(place / "other")})
    student = student_of(run)
    saved = load_file(place / "other" / "model.safetensors")
    found = student.state_dict()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    assert student.config.hidden_dropout_prob == student.config.attention_probs_dropout_prob == 0.25


def test_a_warm_start_without_lm_head_or_changed_since_planning_is_refused(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    make_teacher(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lm_head.dense" not in k}, folder / "model.safetensors")
    with pytest.raises(FatalError, match=r"^train\.warm_start .* weights of lm_head\.dense"):
        student_of(run_of(place, train={"warm_start": str(folder)}))
    with pytest.raises(FatalError, match="changed since this run was planned"):
        student_of(run_of(place, start="0" * 64, train={"warm_start": str(place / "other")}))


def test_the_teachers_dtype_and_attention_are_in_the_run_key_of_online_runs_only(place: Path) -> None:
    eager = {"model": str(place / "teacher"), "attention": "eager"}
    assert run_of(place, teacher=eager).run_key != run_of(place).run_key
    cached = {"source": "cached"}
    assert run_of(place, teacher=eager, targets=cached).run_key == run_of(place, targets=cached).run_key
