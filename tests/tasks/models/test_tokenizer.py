"""A model is used with the ids of its tokenizer.json, even if the class that AutoTokenizer picks gives others."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, RobertaTokenizer

from tasks.eval.finetune import _tokenizer_of
from tasks.models.tokenizer import PLAIN, exact_tokenizer
from tasks.train.export import copy_tokenizer
from tests.harness.tiny import make_teacher

TEXT = "Le maire\u00a0signe le dossier\u202f."


@pytest.fixture
def mismatched(tmp_path: Path) -> Path:
    """A CamemBERT whose file splits at plain spaces only, while the class of transformers splits at all white space."""
    folder = tmp_path / "teacher"
    make_teacher(folder, "camembert", layers=2)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CamembertTokenizer"}))
    return folder


def ids_of_file(folder: Path) -> list[int]:
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids)


def test_auto_tokenizer_gives_other_ids(mismatched: Path) -> None:
    assert AutoTokenizer.from_pretrained(mismatched)(TEXT).input_ids != ids_of_file(mismatched)


def test_evaluation_and_fine_tuning_use_the_ids_of_the_file(mismatched: Path) -> None:
    assert exact_tokenizer(mismatched)(TEXT).input_ids == ids_of_file(mismatched)
    assert _tokenizer_of(mismatched)[1](TEXT).input_ids == ids_of_file(mismatched)


def test_options_do_not_affect_the_comparison_with_the_file(tmp_path: Path) -> None:
    """RoBERTa's byte-level tokenizer puts a space before each pre-split word if add_prefix_space is set."""
    letters = {letter: 5 + number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    RobertaTokenizer(vocab=specials | letters, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    wanted = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    words = exact_tokenizer(tmp_path, add_prefix_space=True)(["un", "dossier"], is_split_into_words=True)
    assert words.input_ids == wanted(["un", "dossier"], is_split_into_words=True).input_ids
    assert words.input_ids != exact_tokenizer(tmp_path)("un dossier").input_ids


def test_the_exported_student_loads_with_the_ids_of_the_file(mismatched: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text((mismatched / "config.json").read_text())
    copy_tokenizer(mismatched, student)
    loaded = AutoTokenizer.from_pretrained(student)
    assert loaded(TEXT).input_ids == ids_of_file(mismatched)
    assert loaded.mask_token == "<mask>"
    assert json.loads((student / "tokenizer_config.json").read_text())["tokenizer_class"] == PLAIN
    assert (student / "tokenizer.json").read_bytes() == (mismatched / "tokenizer.json").read_bytes()


def test_files_of_a_matching_tokenizer_are_copied_unchanged(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    make_teacher(teacher, "modernbert", layers=2)
    student.mkdir()
    copy_tokenizer(teacher, student)
    for path in student.iterdir():
        assert path.read_bytes() == (teacher / path.name).read_bytes()
