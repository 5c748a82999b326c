"""A model is used on the ids that it was trained on: those of tokenizer.json, whatever a class makes of them."""

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
def own_rules(tmp_path: Path) -> Path:
    """A CamemBERT whose file knows no white space but the plain one; transformers' class parts words at any."""
    folder = tmp_path / "teacher"
    make_teacher(folder, "camembert", layers=2)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CamembertTokenizer"}))
    return folder


def by_file(folder: Path) -> list[int]:
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids)


def test_the_class_alone_reads_other_ids(own_rules: Path) -> None:
    assert AutoTokenizer.from_pretrained(own_rules)(TEXT).input_ids != by_file(own_rules)


def test_scores_and_fine_tuning_read_as_the_file_does(own_rules: Path) -> None:
    assert exact_tokenizer(own_rules)(TEXT).input_ids == by_file(own_rules)
    assert _tokenizer_of(own_rules)[1](TEXT).input_ids == by_file(own_rules)


def test_how_it_is_to_be_used_is_no_other_reading(tmp_path: Path) -> None:
    """RoBERTa's own tokenizer parts bytes; words of a sentence get a space before each when that is asked for."""
    letters = {letter: 5 + number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    RobertaTokenizer(vocab=specials | letters, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    wanted = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    words = exact_tokenizer(tmp_path, add_prefix_space=True)(["un", "dossier"], is_split_into_words=True)
    assert words.input_ids == wanted(["un", "dossier"], is_split_into_words=True).input_ids
    assert words.input_ids != exact_tokenizer(tmp_path)("un dossier").input_ids


def test_who_loads_the_student_reads_as_the_file_does(own_rules: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text((own_rules / "config.json").read_text())
    copy_tokenizer(own_rules, student)
    loaded = AutoTokenizer.from_pretrained(student)
    assert loaded(TEXT).input_ids == by_file(own_rules)
    assert loaded.mask_token == "<mask>"
    assert json.loads((student / "tokenizer_config.json").read_text())["tokenizer_class"] == PLAIN
    assert (student / "tokenizer.json").read_bytes() == (own_rules / "tokenizer.json").read_bytes()


def test_files_that_are_read_as_they_are_stay_as_they_are(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    make_teacher(teacher, "modernbert", layers=2)
    student.mkdir()
    copy_tokenizer(teacher, student)
    for path in student.iterdir():
        assert path.read_bytes() == (teacher / path.name).read_bytes()
