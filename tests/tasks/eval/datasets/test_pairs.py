"""PAWS-X and XNLI: official schemas, dropped rows that are counted, and errors with the file and row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import FatalError
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.pairs import load_pairs
from tests.harness.eval_sets import write_pairs


def rewrite(folder, split="train", **columns):
    """Replaces columns of one split; None removes a column."""
    path = folder / f"{split}-00000-of-00001.parquet"
    table = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)


def load(folder, name="xnli"):
    return load_pairs(name, SetLocation(str(folder)))


def test_rows_and_labels(tmp_path):
    data = load(write_pairs(tmp_path, train=50, test=10))
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 10)
    first = pq.read_table(tmp_path / "test-00000-of-00001.parquet").to_pylist()[0]
    assert tuple(data.test[0]) == (first["premise"], first["hypothesis"], first["label"])


def test_paws_rows_without_text_are_dropped_and_counted(tmp_path):
    folder = write_pairs(tmp_path, "paws-x", train=6)
    rewrite(
        folder, sentence1=["NS", "", None, " ", "A", "B"], sentence2=["a", "b", "c", "d", "NS", "e"], label=[0, 1] * 3
    )
    rewrite(folder, sentence1=["x"] * 6, label=[0, 1] * 3, sentence2=["a", "NS", "NS ", "d", "e", "f"])
    data = load(folder, "paws-x")
    assert data.counts["train"] == {"rows": 6, "dropped": 2, "kept": 4}
    assert [row.second for row in data.train] == ["a", "d", "e", "f"]
    rewrite(
        folder, sentence1=["NS", "", None, " ", "A", "B"], sentence2=["a", "b", "c", "d", "e", "f"], label=[0, 1] * 3
    )
    assert load(folder, "paws-x").counts["train"]["dropped"] == 4


def test_empty_text_in_xnli_fails(tmp_path):
    rewrite(write_pairs(tmp_path, train=3), premise=["a", "", "c"], label=[0, 1, 2])
    with pytest.raises(FatalError, match=r"train.*parquet, row 1: premise is empty"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": None}, "column label should be integers but is missing"),
        ({"label": ["0", "1", "2"]}, "column label should be integers but is string"),
        ({"premise": None}, "column premise should be text but is missing"),
        ({"label": [0, 1, 3]}, "row 2: label is 3, but only 0 to 2"),
        ({"label": [0, -1, 2]}, "row 1: label is -1"),
        ({"label": [0, 1, None]}, "row 2: label is None"),
        ({"label": [0, 0, 2]}, r"no train row of xnli has label 1 \(neutral\)"),
    ],
)
def test_another_schema_fails_with_the_column_and_file(tmp_path, columns, message):
    rewrite(write_pairs(tmp_path, train=3), **({"label": [0, 1, 2]} | columns))
    with pytest.raises(FatalError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_label_names_in_the_file_must_match(tmp_path):
    folder = write_pairs(tmp_path)
    path = folder / "train-00000-of-00001.parquet"
    for names, fits in ((("entailment", "neutral", "contradiction"), True), (("contradiction", "x", "y"), False)):
        features = str({"info": {"features": {"label": {"names": list(names)}}}}).replace("'", '"')
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": features}), path)
        if fits:
            assert load(folder).train
        else:
            with pytest.raises(FatalError, match="renumber the column label"):
                load(folder)


def test_missing_split_fails_with_its_name(tmp_path):
    (write_pairs(tmp_path) / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(FatalError, match="the validation split of xnli has no rows"):
        load(tmp_path)


def test_shared_sets(shared_data):
    """These sets are 80/10/10 splits of the official validation splits."""
    xnli = load(shared_data / "eval" / "xnli" / "fr")
    assert (len(xnli.train), len(xnli.validation), len(xnli.test)) == (2000, 230, 260)
    paws = load(shared_data / "eval" / "paws-x" / "fr", "paws-x")
    assert sum(counts["rows"] for counts in paws.counts.values()) == 2000
    assert all(counts["rows"] - counts["kept"] == counts["dropped"] for counts in paws.counts.values())
