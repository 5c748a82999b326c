"""Snapshots of a corpus folder: complete, ordered, verified against checksum files, and confined to the folder."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.checksums import parse_checksums
from tasks.corpus.snapshot import remember_source_content, source_content, take_snapshot
from tasks.recipe.config import CorpusSettings

HASH = "ab" * 32


def labels(settings: CorpusSettings) -> list[str]:
    return [source.label for source in take_snapshot(settings).sources]


def test_sources_in_natural_order_with_sizes_and_checksums(corpus: Any) -> None:
    paths = [corpus.oscar_2301(f"fr_meta/fr_meta_part_{number}.jsonl.zst") for number in (10, 2, 1)]
    corpus.checksums("fr_meta/fr_sha256.txt")
    snapshot = take_snapshot(corpus.settings())
    assert [source.name for source in snapshot.sources] == [
        "fr_meta/fr_meta_part_1.jsonl.zst",
        "fr_meta/fr_meta_part_2.jsonl.zst",
        "fr_meta/fr_meta_part_10.jsonl.zst",
    ]
    assert [source.label for source in snapshot.sources] == ["fr_meta_part_1", "fr_meta_part_2", "fr_meta_part_10"]
    assert [source.url for source in snapshot.sources] == [os.fspath(path) for path in reversed(paths)]
    assert all(source.sha256 and source.size == Path(source.url).stat().st_size for source in snapshot.sources)


def test_files_that_are_not_sources_are_ignored(corpus: Any) -> None:
    corpus.oscar_2301("part_1.jsonl.zst")
    for name in (
        "README.md",
        "LICENSE",
        "licence.txt",
        "notes.md",
        "_SUCCESS",
        ".hidden/x.jsonl",
        "MD5SUMS",
        "fr_md5.txt",
    ):
        corpus.write(name, b"x")
    corpus.checksums("SHA256SUMS", mark=" *")
    assert labels(corpus.settings()) == ["part_1"]


def test_pattern_matches_file_names(corpus: Any) -> None:
    for number in range(1, 4):
        corpus.oscar_2301(f"a/part_{number}.jsonl")
    assert labels(corpus.settings(pattern="part_[12].*")) == ["part_1", "part_2"]
    with pytest.raises(FatalError, match=r"contains no source file that matches \*\.parquet"):
        take_snapshot(corpus.settings(pattern="*.parquet"))


def test_oscar_2109_pair_is_one_source(corpus: Any) -> None:
    for number in (1, 2):
        corpus.oscar_2109(number)
    corpus.oscar_2201("fr_meta_part_3.jsonl.gz")
    corpus.checksums()
    sources = take_snapshot(corpus.settings()).sources
    assert [source.name for source in sources] == ["fr_meta_part_3.jsonl.gz", "fr_part_1.txt.gz", "fr_part_2.txt.gz"]
    assert sources[0].companion is None
    assert sources[2].companion is not None
    assert sources[2].companion.name == "fr_meta_part_2.jsonl.gz"
    assert sources[2].companion.sha256
    assert labels(corpus.settings(pattern="*_part_2.txt.gz")) == ["fr_part_2"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["05-23/fr_meta/part_1.jsonl.zst", "06-23/fr_meta/part_1.jsonl.zst"],
            ["05-23-fr_meta-part_1", "06-23-fr_meta-part_1"],
        ),
        (["x/été (1).txt", "x/-b c|d.txt"], ["b_c_d", "t_1_"]),
        (["...txt"], None),
    ],
)
def test_labels_are_unique_and_safe(corpus: Any, names: list[str], expected: list[str] | None) -> None:
    for name in names:
        corpus.write(name, b"x\n")
    if expected is None:
        with pytest.raises(FatalError, match="contains no source"):
            take_snapshot(corpus.settings())
    else:
        assert labels(corpus.settings()) == expected


@given(
    st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_any_file_names_get_unique_safe_labels(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / f"x{name}.jsonl").write_text("{}", encoding="utf-8")
    found = labels(CorpusSettings(url=str(folder)))
    assert len({label.lower() for label in found}) == len(found) == len(list(folder.iterdir()))
    assert all(
        label.replace(".", "").replace("_", "").replace("-", "").isalnum() and label.isascii() for label in found
    )


def test_labels_of_files_with_one_stem_get_a_hash(corpus: Any) -> None:
    for name in ("part_1.txt", "part_1.jsonl", "Part_1.parquet"):
        corpus.write(name, b"x\n")
    found = labels(corpus.settings())
    assert len(set(found)) == 3
    assert all(label.lower().startswith("part_1-") for label in found)


# ---- checksum files ----------------------------------------------------------------------------------------


names = st.text(st.sampled_from("abé_-. 0"), min_size=1, max_size=8).filter(
    lambda name: name == name.strip() and name not in (".", "..") and not name.startswith("./")
)


@given(st.dictionaries(names, st.binary(min_size=32, max_size=32)), st.sampled_from([" ", "  ", " *"]), st.booleans())
def test_checksum_lines_of_oscar_and_sha256sum_are_parsed(hashes: dict[str, bytes], mark: str, windows: bool) -> None:
    text = "".join(f"{digest.hex()}{mark}{name}\n" for name, digest in hashes.items())
    if windows:
        text = "\ufeff" + text.replace("\n", "\r\n")
    assert parse_checksums(text, "fr_sha256.txt") == {name: digest.hex() for name, digest in hashes.items()}


@pytest.mark.parametrize(
    "name",
    ["../up.jsonl", "/etc/passwd", "a/../../b", "a//b", "..", "a\\b", "a\tb", "a\x00b", "a\u202eb", "*/etc/passwd"],
)
def test_checksum_names_outside_the_folder_fail(name: str) -> None:
    with pytest.raises(FatalError, match=r"fr_sha256.txt, line 2: the name .* points outside the folder") as caught:
        parse_checksums(f"{HASH} fine.jsonl\n{HASH} {name}\n", "fr_sha256.txt")
    assert (caught.value.file, caught.value.line) == ("fr_sha256.txt", 2)


@pytest.mark.parametrize(
    "line", ["hello", HASH, HASH[1:] + " a", "g" * 64 + " a", f"SHA256 (a) = {HASH}", HASH + "   "]
)
def test_malformed_checksum_lines_fail(line: str) -> None:
    with pytest.raises(FatalError, match="x, line 1: expected `sha256 name`"):
        parse_checksums(line, "x")


def test_two_hashes_for_one_name_fail() -> None:
    assert parse_checksums(f"{HASH} a\n{HASH.upper()}  ./a\n", "x") == {"a": HASH}
    with pytest.raises(FatalError, match="second, different hash of a"):
        parse_checksums(f"{HASH} a\n{'0' * 64} a\n", "x")


def test_missing_file_that_a_checksum_file_names_fails(corpus: Any) -> None:
    missing = corpus.oscar_2301("fr_meta/part_2.jsonl")
    corpus.oscar_2301("fr_meta/part_1.jsonl")
    corpus.checksums("fr_meta/fr_sha256.txt")
    missing.unlink()
    with pytest.raises(FatalError, match=r"fr_meta/part_2\.jsonl is listed in a checksum file but does not exist"):
        take_snapshot(corpus.settings())
    assert take_snapshot(corpus.settings(), partial=True).absent == ("fr_meta/part_2.jsonl",)
    assert labels(corpus.settings(pattern="part_1*")) == ["part_1"]


# ---- invalid folders ---------------------------------------------------------------------------------------


def test_invalid_corpus_folders_fail(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match=r"corpus\.url .* does not exist"):
        take_snapshot(CorpusSettings(url=str(tmp_path / "nothing")))
    with pytest.raises(FatalError, match="contains no source file; correct"):
        take_snapshot(CorpusSettings(url=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(FatalError, match="a file, not a folder"):
        take_snapshot(CorpusSettings(url=str(tmp_path / "a.jsonl")))
    with pytest.raises(FatalError, match="nowhere://x cannot be opened"):
        take_snapshot(CorpusSettings(url="nowhere://x"))


@pytest.mark.parametrize("target", ["outside.jsonl", "outside", "nothing"])
def test_links_out_of_the_folder_fail_with_their_name(corpus: Any, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside.jsonl").write_text("{}")
    corpus.oscar_2301("part_1.jsonl")
    (corpus.path / "link.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(FatalError, match=r"link\.jsonl is a link that is broken or points outside the corpus folder"):
        take_snapshot(corpus.settings())


def test_links_inside_the_folder_are_followed_once(corpus: Any) -> None:
    target = corpus.oscar_2301("real/part_1.jsonl")
    (corpus.path / "part_2.jsonl").symlink_to(target)
    (corpus.path / "real" / "loop").symlink_to(corpus.path)
    sources = take_snapshot(corpus.settings()).sources
    assert [source.name for source in sources] == ["part_2.jsonl", "real/part_1.jsonl"]
    assert sources[0].size == target.stat().st_size


def test_named_pipe_fails(corpus: Any) -> None:
    corpus.oscar_2301("part_1.jsonl")
    os.mkfifo(corpus.path / "part_2.jsonl")
    with pytest.raises(FatalError, match="neither a file nor a folder"):
        take_snapshot(corpus.settings())


# ---- identity ----------------------------------------------------------------------------------------------


def test_fingerprint_covers_checksums_or_else_stamps(corpus: Any) -> None:
    path = corpus.oscar_2301("part_1.jsonl")
    first = take_snapshot(corpus.settings()).fingerprint
    os.utime(path, (1, 1))
    touched = take_snapshot(corpus.settings()).fingerprint
    assert touched != first
    corpus.checksums()
    checked = take_snapshot(corpus.settings()).fingerprint
    os.utime(path, (2, 2))
    assert take_snapshot(corpus.settings()).fingerprint == checked != touched


def test_content_hash_is_remembered_until_the_file_changes(corpus: Any, store: Store) -> None:
    path = corpus.oscar_2301("part_1.jsonl")
    (source,) = take_snapshot(corpus.settings()).sources
    assert source_content(store, source) is None
    remember_source_content(store, source, HASH)
    assert source_content(store, source) == HASH
    os.utime(path, (1, 1))
    (source,) = take_snapshot(corpus.settings()).sources
    assert source_content(store, source) is None


def test_snapshot_of_an_fsspec_url(corpus: Any) -> None:
    fs = fsspec.filesystem("memory")
    path = corpus.oscar_2301("part_1.jsonl.zst")
    corpus.checksums()
    for file in corpus.path.iterdir():
        fs.pipe_file(f"/snapshot-test/fr_meta/{file.name}", file.read_bytes())
    (source,) = take_snapshot(corpus.settings(url="memory://snapshot-test")).sources
    assert (source.name, source.label) == ("fr_meta/part_1.jsonl.zst", "part_1")
    assert source.url == "memory:///snapshot-test/fr_meta/part_1.jsonl.zst"
    assert source.size == path.stat().st_size
    assert source.sha256 == take_snapshot(corpus.settings()).sources[0].sha256
    assert source.stamp
    assert not source.is_local


def test_snapshot_of_a_real_corpus(shared_data: Path) -> None:
    snapshot = take_snapshot(CorpusSettings(url=str(shared_data / "corpus" / "2026-09")))
    assert [source.label for source in snapshot.sources] == [f"fr_meta_part_{number}" for number in range(1, 15)]
    assert all(source.sha256 for source in snapshot.sources)
