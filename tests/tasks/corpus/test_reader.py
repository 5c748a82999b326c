"""Every schema is recognised from its data, and unreadable lines are reported with file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage.errors import FatalError
from tasks.corpus.document import Document, Labels
from tasks.corpus.filters import EARLY_STOP_MARGIN
from tasks.corpus.formats import text_layout
from tasks.corpus.quarantine import DocumentCounts
from tasks.corpus.reader import read_documents

FRENCH = Labels("fr", 0.9, None, ())


@pytest.fixture
def read(corpus: Any, tmp_path: Path) -> Callable[..., tuple[list[Document], DocumentCounts]]:
    """A function that reads one file of the corpus to its end."""

    def read(path: Path, companion: Path | None = None, **changes: Any) -> tuple[list[Document], DocumentCounts]:
        settings = corpus.settings(**changes)
        counts = DocumentCounts(path.name, settings, tmp_path / "quarantine.jsonl")
        documents = list(read_documents(path, path.name, settings, counts, tmp_path, companion))
        counts.finish()
        return documents, counts

    return read


def quarantined(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text("utf-8").splitlines()]


def texts(documents: list[Document]) -> tuple[str, ...]:
    return tuple(document.text.decode() for document in documents)


# ---- schemas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_schemas_are_recognised_packed_or_not(corpus: Any, read: Any, packing: str) -> None:
    files = {
        "oscar-23.01": corpus.oscar_2301(f"fr_meta/fr_meta_part_1.jsonl{packing}"),
        "oscar-22.01": corpus.oscar_2201(f"fr_part_1.jsonl{packing}"),
        "jsonl": corpus.jsonl(f"plain.jsonl{packing}", [{"text": text} for text in corpus.texts]),
    }
    for schema, path in files.items():
        documents, counts = read(path)
        assert counts.schema == schema
        assert texts(documents) == corpus.texts
        assert [document.line for document in documents] == [1, 2, 3]
        assert [document.chars for document in documents] == [len(text) for text in corpus.texts]
        assert documents[0].labels == (None if schema == "jsonl" else FRENCH)
        assert (counts.lines, counts.documents, counts.bad_lines) == (3, 3, 0)


@pytest.mark.parametrize("name", ["fr_part_3.jsonl.gz", "fr_meta_3.jsonl.gz", "fr_meta_part_3.jsonl.gz", "data"])
def test_oscar_2201_is_recognised_by_any_file_name(corpus: Any, read: Any, name: str) -> None:
    documents, counts = read(corpus.oscar_2201(name, annotation=["header", "short_sentences"]))
    assert counts.schema == "oscar-22.01"
    assert documents[0].labels == Labels("fr", 0.9, None, ("header", "short_sentences"))


def test_oscar_2301_labels_are_read(corpus: Any, read: Any) -> None:
    path = corpus.oscar_2301("a.jsonl.zst", harmful_pp=512.5, quality_warnings=["tiny"])
    assert read(path)[0][0].labels == Labels("fr", 0.9, 512.5, ("tiny",))


@pytest.mark.parametrize(
    "metadata", [None, {}, {"identification": None}, "a string", {"identification": {"prob": "x"}}]
)
def test_null_or_malformed_metadata_gives_no_labels(corpus: Any, read: Any, metadata: Any) -> None:
    documents, counts = read(corpus.jsonl("a.jsonl", [{"content": "Bonjour.", "metadata": metadata}]))
    assert counts.bad_lines == 0
    assert documents[0].labels in (None, Labels(None, None, None, ()))


def test_oscar_2019_has_one_document_per_line(corpus: Any, read: Any) -> None:
    lines = ["Première ligne.", "Deuxième ligne.", "Troisième, sans fin de ligne"]
    documents, counts = read(corpus.write("fr_part_1.txt.gz", "\n".join(lines).encode()))
    assert counts.schema == "oscar-2019"
    assert texts(documents) == tuple(lines)


def test_single_blank_line_does_not_turn_lines_into_paragraphs(corpus: Any, read: Any) -> None:
    lines = [f"Ligne {i}." for i in range(300)]
    lines[40] = ""
    documents, counts = read(corpus.write("fr_part_1.txt.gz", "\n".join(lines).encode()))
    assert (counts.schema, len(documents)) == ("oscar-2019", 299)
    assert documents[40].line == 42


def two_lines_each(count: int) -> str:
    return "".join(f"Texte {i}.\nEt sa suite.\n\n" for i in range(count))


def test_long_first_document_does_not_hide_later_blank_lines(corpus: Any, read: Any) -> None:
    first = "".join(f"Phrase {i} du premier texte.\n" for i in range(5000))
    documents, counts = read(corpus.write("fr_part_1.txt", f"{first}\n{two_lines_each(3000)}".encode()))
    assert (counts.schema, len(documents)) == ("oscar-21.09", 3001)
    assert documents[-1].text.decode() == "Texte 2999.\nEt sa suite."


def test_text_that_changes_its_layout_fails_unless_the_recipe_sets_one(
    corpus: Any, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_layout, "SAMPLE_BYTES", 100_000)
    first = "".join(f"Phrase {i} du premier texte.\n" for i in range(5000))
    path = corpus.write("fr_part_1.txt.gz", f"{first}\n{two_lines_each(3000)}".encode())
    with pytest.raises(
        FatalError, match=r'^fr_part_1\.txt\.gz begins .* line 5,002 .* set corpus\.text to "lines"'
    ) as caught:
        read(path)
    assert (caught.value.file, caught.value.line) == (path.name, 5002)
    documents, counts = read(path, text="paragraphs")
    assert (counts.schema, len(documents)) == ("oscar-21.09", 3001)
    documents, counts = read(path, text="lines")
    assert (counts.schema, len(documents)) == ("oscar-2019", 11_000)


def test_scattered_blank_lines_do_not_contradict_the_layout(
    corpus: Any, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One blank line in 150 lines, and dozens in one place."""
    monkeypatch.setattr(text_layout, "SAMPLE_BYTES", 100_000)
    lines = [f"Ligne {i}." if i % 150 else "" for i in range(60_000)]
    lines[30_001:30_061:2] = [""] * 30
    lines += [""] * 500
    documents, counts = read(corpus.write("fr_part_1.txt", "\n".join(lines).encode()))
    assert (counts.schema, len(documents)) == ("oscar-2019", sum(line != "" for line in lines))


def test_layout_setting_applies_only_to_text_without_metadata(corpus: Any, read: Any) -> None:
    text, metadata = corpus.oscar_2109(1)
    assert texts(read(text, metadata, text="lines")[0]) == corpus.texts
    assert len(read(text, text="lines")[0]) == 4
    path = corpus.oscar_2301("a.jsonl")
    assert texts(read(path, text="paragraphs")[0]) == corpus.texts


def test_oscar_2109_pair_is_read(corpus: Any, read: Any) -> None:
    text, metadata = corpus.oscar_2109(1)
    documents, counts = read(text, metadata)
    assert counts.schema == "oscar-21.09"
    assert texts(documents) == corpus.texts
    assert [document.line for document in documents] == [1, 4, 6]
    assert [document.chars for document in documents] == [len(text) for text in corpus.texts]


def test_oscar_2109_text_is_read_without_its_metadata(corpus: Any, read: Any) -> None:
    text, _ = corpus.oscar_2109(1)
    assert texts(read(text)[0]) == corpus.texts


def test_oscar_2109_pair_whose_files_do_not_match_fails(corpus: Any, read: Any) -> None:
    text, _ = corpus.oscar_2109(1)
    _, metadata = corpus.oscar_2109(2, corpus.texts[:2])
    with pytest.raises(FatalError, match=r"fr_part_1.txt.gz contains 3 documents, .* fr_meta_part_2.jsonl.gz has 2"):
        read(text, metadata)
    with pytest.raises(FatalError, match=r"content, metadata, warc_headers in the metadata file of fr_part_1\.txt\.gz"):
        read(text, corpus.oscar_2201("fr_meta_part_1.jsonl.gz"))


def test_oscar_2109_counts_a_document_whose_only_line_is_bad(corpus: Any, read: Any, tmp_path: Path) -> None:
    _, metadata = corpus.oscar_2109(1)
    text = corpus.write("fr_part_1.txt.gz", b"Un.\n\n\xff\xfe\n\nTrois.\n\n")
    documents, counts = read(text, metadata)
    assert texts(documents) == ("Un.", "Trois.")
    assert (counts.documents, quarantined(tmp_path)[0]["line"]) == (3, 3)


@pytest.mark.parametrize(
    "columns", [{"id": [0, 1, 2]}, {"meta": [{"identification": {"label": "fr", "prob": 0.9}}] * 3}]
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_become_documents(corpus: Any, read: Any, columns: dict[str, Any], kind: pa.DataType) -> None:
    path = corpus.parquet(
        "train-00000-of-00001.parquet", columns | {"text": pa.array(corpus.texts, pa.string()).cast(kind)}
    )
    documents, counts = read(path)
    assert counts.schema == "parquet"
    assert texts(documents) == corpus.texts
    assert [document.line for document in documents] == [1, 2, 3]
    assert documents[0].labels == (FRENCH if "meta" in columns else None)


def test_packed_parquet_and_bad_rows(corpus: Any, read: Any, tmp_path: Path) -> None:
    path = corpus.parquet("a.parquet", {"content": ["un", None, "long" * 1000, "deux"]})
    packed = corpus.write("b.parquet.gz", path.read_bytes())
    for file in (path, packed):
        documents, counts = read(file, max_line_bytes=1000)
        assert texts(documents) == ("un", "deux")
        assert [(entry["line"], entry["reason"]) for entry in quarantined(tmp_path)] == [
            (2, "null"),
            (3, "a text of 4,000 bytes"),
        ]
        assert (counts.lines, counts.documents, counts.bad_lines) == (4, 2, 2)


def test_real_oscar_2201_samples_are_read(shared_data: Path, read: Any) -> None:
    path = shared_data / "oscar-22.01-samples" / "data.jsonl"
    documents, counts = read(path)
    records = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    assert counts.schema == "oscar-22.01"
    assert texts(documents) == tuple(record["content"] for record in records)
    assert sum(document.labels is not None and document.labels.language == "fr" for document in documents) == 7


# ---- variants that are accepted ----------------------------------------------------------------------------


def test_carriage_returns_byte_order_mark_and_blank_lines_are_accepted(corpus: Any, read: Any) -> None:
    record = json.dumps({"text": "Été."}).encode()
    documents, counts = read(corpus.write("a.jsonl", b"\xef\xbb\xbf" + record + b"\r\n\r\n  \n" + record))
    assert texts(documents) == ("Été.", "Été.")
    assert [document.line for document in documents] == [1, 4]
    assert counts.bad_lines == 0
    documents, _ = read(corpus.write("a.txt", b"\xef\xbb\xbfUn.\r\nDeux.\r\n"))
    assert texts(documents) == ("Un.", "Deux.")
    documents, _ = read(corpus.write("b.txt", b"Un.\r\nSuite.\r\n\r\nDeux.\r\n"))
    assert texts(documents) == ("Un.\nSuite.", "Deux.")


# ---- quarantined lines -------------------------------------------------------------------------------------


def test_bad_lines_are_quarantined_with_line_reason_and_excerpt(corpus: Any, read: Any, tmp_path: Path) -> None:
    good = {"content": "Bonjour."}
    bad = {
        2: (b'{"content": "cut', "not JSON"),
        4: (b'{"content": "\xff"}', "not UTF-8"),
        5: (b'{"text": "elsewhere", "id": 1}', "without the field content (its fields: id, text)"),
        6: (b'{"content": null}', "the field content is null"),
        7: (b'["content"]', "not a JSON object but an array"),
        8: (b'{"content": "' + b"x" * 5000 + b'"}', "a line of 5,015 bytes"),
        9: (b'{"content": "\\ud800"}', "not JSON"),
        10: (b"[" * 4000, "not JSON"),
    }
    lines = [bad[number][0] if number in bad else good for number in range(1, 12)]
    documents, counts = read(corpus.jsonl("a.jsonl", lines), max_line_bytes=4500)
    assert [document.line for document in documents] == [1, 3, 11]
    assert (counts.lines, counts.documents, counts.bad_lines) == (11, 3, 8)
    for entry, (number, (line, reason)) in zip(quarantined(tmp_path), bad.items(), strict=True):
        assert entry["line"] == number
        assert reason in entry["reason"]
        assert line.decode("utf-8", "replace").startswith(entry["excerpt"])
        assert 0 < len(entry["excerpt"]) <= 200


def test_bad_first_line_does_not_hide_the_schema(corpus: Any, read: Any) -> None:
    for name in ("a.jsonl", "data"):
        documents, counts = read(corpus.jsonl(name, [b"garbage", {"content": "Bonjour."}]))
        assert (texts(documents), counts.bad_lines) == (("Bonjour.",), 1)


def test_more_bad_lines_than_the_limit_fail(corpus: Any, read: Any) -> None:
    lines: list[Any] = [{"text": "bon"}] * 3000 + [b"{"] * 3
    assert read(corpus.jsonl("a.jsonl", lines), max_bad_lines=0)[1].bad_lines == 3
    lines.append(b"{")
    assert read(corpus.jsonl("a.jsonl", lines), max_bad_lines=4)[1].bad_lines == 4
    with pytest.raises(
        FatalError, match=r"a.jsonl: 4 of 3004 lines are bad, more than the 3 allowed.*line 3001"
    ) as caught:
        read(corpus.jsonl("a.jsonl", lines), max_bad_lines=0)
    assert (caught.value.file, caught.value.line) == ("a.jsonl", 3001)


def test_source_of_bad_lines_fails_before_its_end(corpus: Any, read: Any, tmp_path: Path) -> None:
    path = corpus.jsonl("a.jsonl", [{"text": "bon"}, *[b"{"] * 3 * EARLY_STOP_MARGIN])
    with pytest.raises(FatalError, match=rf"{EARLY_STOP_MARGIN + 11} of {EARLY_STOP_MARGIN + 12} lines are bad"):
        read(path)
    assert len(quarantined(tmp_path)) == EARLY_STOP_MARGIN + 11


def test_too_long_text_document_is_quarantined_once(corpus: Any, read: Any, tmp_path: Path) -> None:
    path = corpus.write("a.txt", b"Un.\n\n" + b"Encore une phrase.\n" * 60 + b"\nTrois.\n")
    documents, counts = read(path, max_line_bytes=1000)
    assert texts(documents) == ("Un.", "Trois.")
    assert (counts.lines, counts.documents, counts.bad_lines) == (64, 3, 1)
    assert quarantined(tmp_path)[0]["line"] == 3


# ---- files that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.jsonl", b'{"url": "x", "body": "y"}\n', "fields: body, url"),
        ("a.jsonl", b'[{"text": "x"}]\n', "not a JSON object but an array"),
        ("a.jsonl.zst", b"hello\n", "not JSON .*'hello'"),
        ("a.csv", b"id,text\n1,bonjour\n", "'id,text' .plain text needs .txt in its name"),
        ("a.txt", "été".encode("utf-16"), "UTF-16 text"),
        ("a.txt", b"BZh91AY&SY", "a bzip2 archive"),
        ("a.txt.gz", bytes(100), "binary data"),
        ("a.bin.gz", b"\x00\x01\x02", "binary data"),
        ("fr_meta_part_1.jsonl.gz", b'{"headers": {}, "offset": 0, "nb_sentences": 3}\n', "without its text file"),
    ],
)
def test_unknown_schema_error_describes_the_content(corpus: Any, read: Any, name: str, data: bytes, found: str) -> None:
    with pytest.raises(FatalError, match=rf"^{name}: unknown schema, found .*{found}") as caught:
        read(corpus.write(name, data))
    assert caught.value.file == name
    assert "\n" not in str(caught.value)


def test_unknown_parquet_columns_fail(corpus: Any, read: Any) -> None:
    with pytest.raises(FatalError, match=r"a.parquet: unknown schema, found parquet columns tokens, tags"):
        read(corpus.parquet("a.parquet", {"tokens": [["a"]], "tags": [[1]]}))
    with pytest.raises(FatalError, match="unknown schema"):
        read(corpus.parquet("b.parquet", {"text": [1, 2]}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.zst", "a"])
def test_empty_file_fails(corpus: Any, read: Any, name: str) -> None:
    with pytest.raises(FatalError, match=rf"^{name} is empty"):
        read(corpus.write(name, b""))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_file_of_blank_lines_fails(corpus: Any, read: Any, name: str) -> None:
    with pytest.raises(FatalError, match=rf"^{name} contains no documents"):
        read(corpus.write(name, b"\n \n\r\n"))


def test_truncated_or_empty_parquet_fails(corpus: Any, read: Any) -> None:
    path = corpus.parquet("a.parquet", {"text": ["un", "deux", "trois"]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FatalError, match=r"a.parquet is damaged or truncated"):
        read(path)
    with pytest.raises(FatalError, match=r"b.parquet contains no documents"):
        read(corpus.parquet("b.parquet", {"text": pa.array([], pa.string())}))


def test_truncated_archive_fails_even_after_good_documents(corpus: Any, read: Any) -> None:
    path = corpus.jsonl("a.jsonl.zst", [{"text": f"Document {i} {i**9}"} for i in range(20_000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FatalError, match=r"a.jsonl.zst is truncated"):
        read(path)
