"""Loading a named-entity set: file layouts, schema checks, and duplicates that are removed and counted."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import FatalError
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.ner import NerSet, Sentence
from tasks.eval.datasets.ner import load_ner as load_named

A, B, C, D, E = (f"Phrase {letter} .".split() for letter in "ABCDE")
TAGS = [0, 1, 0]


def load_ner(source: str) -> NerSet:
    return load_named("ner", SetLocation(source))


def write(path, sentences, tags=None, **columns):
    table = {"id": list(range(len(sentences))), "tokens": sentences, "ner_tags": tags or [TAGS] * len(sentences)}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in (table | columns).items() if value is not None}
    pq.write_table(pa.table(kept), path)


def write_set(folder, train, test, validation=None):
    write(folder / "train-00000-of-00001.parquet", train)
    write(folder / "test-00000-of-00001.parquet", test)
    if validation:
        write(folder / "validation-00000-of-00001.parquet", validation)
    return str(folder)


def words(sentences):
    return [list(sentence.words) for sentence in sentences]


def test_duplicates_are_removed_and_counted(tmp_path):
    ner = load_ner(write_set(tmp_path, [A, A, B, C, D], [B, E, E], validation=[C, E]))
    assert words(ner.train) == [A, D]
    assert words(ner.validation) == [C]
    assert words(ner.test) == [B, E]
    assert words(ner.test_published) == [B, E, E]
    assert ner.counts == {
        "test": {"rows": 3, "duplicates": 1, "in_other_split": 0, "kept": 2},
        "validation": {"rows": 2, "duplicates": 0, "in_other_split": 1, "kept": 1},
        "train": {"rows": 5, "duplicates": 1, "in_other_split": 2, "kept": 2},
    }


@pytest.mark.parametrize(
    "names", [("train-00000-of-00001", "test-00000-of-00001"), ("data/train", "data/test"), ("train/0000", "test/0000")]
)
def test_file_layouts(tmp_path, names):
    for name, sentences in zip(names, ([A, B], [C]), strict=True):
        write(tmp_path / f"{name}.parquet", sentences)
    ner = load_ner(str(tmp_path))
    assert words(ner.test) == [C]
    assert sorted(words(ner.train) + words(ner.validation)) == [A, B]


def test_a_tenth_of_train_is_held_out_by_hash_without_a_validation_split(tmp_path):
    many = [["Phrase", str(number), "."] for number in range(50)]
    ner = load_ner(write_set(tmp_path / "one", many, [A]))
    assert (len(ner.train), len(ner.validation)) == (45, 5)
    assert (ner.counts["train"]["kept"], ner.counts["validation"]["kept"]) == (45, 5)
    assert "held out for validation" in ner.rule
    # The order does not matter, and an added sentence moves at most one other.
    other = load_ner(write_set(tmp_path / "other", [B, *reversed(many)], [A]))
    assert (
        len({tuple(words) for words in words(ner.validation)} - {tuple(words) for words in words(other.validation)})
        <= 1
    )


def test_split_in_several_files_loads_from_any_url(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", [A])
    write(tmp_path / "train-00001-of-00002.parquet", [B])
    write(tmp_path / "test-00000-of-00001.parquet", [C])
    write(tmp_path / "validation-00000-of-00001.parquet", [D])
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/ner-set/", recursive=True)
    ner = load_ner("memory://ner-set")
    assert words(ner.train) == [A, B]
    assert words(ner.validation) == [D]
    assert ner.fingerprint == load_ner(str(tmp_path)).fingerprint


def test_fingerprint_depends_on_the_content(tmp_path):
    one = load_ner(write_set(tmp_path / "one", [A, B], [C]))
    other = load_ner(write_set(tmp_path / "other", [A, D], [C]))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ner_tags": None}, "column ner_tags should be a list of integers but is missing"),
        ({"tokens": ["a b", "c d"]}, "column tokens should be a list of text but is string"),
        ({"ner_tags": [["O", "LOC", "O"]] * 2}, "column ner_tags should be a list of integers"),
        ({"ner_tags": [[0, 1, 0], [0, 7, 0]]}, r"row 1: ner_tags contains \[0, 7\], but only 0 to 4"),
        ({"ner_tags": [[0, 1, 0], [0, 1]]}, "row 1: tokens and ner_tags differ in length"),
        ({"ner_tags": [[0, 1, 0], [0, None, 0]]}, "row 1: ner_tags contains"),
        ({"tokens": [["Phrase", "A", "."], ["Phrase", None, "."]]}, "row 1: tokens and ner_tags"),
    ],
)
def test_another_schema_fails_with_the_column_and_file(tmp_path, columns, message):
    write(tmp_path / "test.parquet", [C])
    write(tmp_path / "train.parquet", [A, B], **columns)
    with pytest.raises(FatalError, match=message) as caught:
        load_ner(str(tmp_path))
    assert "train.parquet" in str(caught.value)


def test_label_names_in_the_file_must_match(tmp_path):
    write(tmp_path / "test.parquet", [C])
    for names, fits in ((["O", "LOC", "PER", "MISC", "ORG"], True), (["O", "PER", "LOC", "ORG", "MISC"], False)):
        features = str({"info": {"features": {"ner_tags": {"feature": {"names": names}}}}}).replace("'", '"')
        table = pa.table({"tokens": [A], "ner_tags": [TAGS]}).replace_schema_metadata({"huggingface": features})
        pq.write_table(table, tmp_path / "train.parquet")
        write(tmp_path / "validation.parquet", [D])
        if fits:
            assert load_ner(str(tmp_path)).train == (Sentence(tuple(A), tuple(TAGS)),)
        else:
            with pytest.raises(FatalError, match="renumber the tags"):
                load_ner(str(tmp_path))


def test_missing_or_broken_files_fail(tmp_path):
    with pytest.raises(FatalError, match="no such folder"):
        load_ner(str(tmp_path / "absent"))
    with pytest.raises(FatalError, match="no train sentences"):
        load_ner(str(tmp_path))
    write(tmp_path / "train.parquet", [A])
    with pytest.raises(FatalError, match="no test sentences"):
        load_ner(str(tmp_path))
    (tmp_path / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(FatalError, match="cannot be read"):
        load_ner(str(tmp_path))


def test_two_sets_in_one_folder_fail(tmp_path):
    write_set(tmp_path / "fr", [A], [B])
    write_set(tmp_path / "en", [C], [D])
    with pytest.raises(FatalError, match="contains several data sets"):
        load_ner(str(tmp_path))


def test_wikineural(shared_data):
    ner = load_ner(str(shared_data / "eval" / "wikineural" / "fr"))
    assert {split: counts["kept"] for split, counts in ner.counts.items()} == {
        "train": 10_053,
        "validation": 1_274,
        "test": 1_273,
    }
