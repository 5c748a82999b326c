"""A model is used on the ids that it was trained on: those of tokenizer.json, whatever a class makes of them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tasks.finetune import _tokenizer_of
from tasks.model import copy_tokenizer
from tasks.tokenizer import PLAIN, exact_tokenizer
from tests.tiny import make_teacher

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
