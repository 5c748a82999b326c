"""Checks that misleading names, and names that lead out of their folder, are rejected, and nothing is written there."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from storage.artifact import receipt_from_json
from storage.errors import FatalError, printable
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.checksums import parse_checksums
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tasks.recipe.config import CorpusSettings
from tasks.recipe.load import load_recipe, make_recipe
from tests.harness.recipe_values import recipe_values

HASH = "a" * 64
OUT = ("../../etc/passwd", "/etc/passwd", "a/../../b", "./../x", "a//b", "a\\b", "..", "a\0b", "a\x1b[2Jb", "a\u202eb")


def one_line(error: BaseException) -> bool:
    return all(mark.isprintable() for mark in str(error))


@pytest.mark.parametrize("name", OUT)
def test_a_checksum_file_names_nothing_outside_its_folder(name: str) -> None:
    with pytest.raises(FatalError, match=r"^sums, line 1: ") as caught:
        parse_checksums(f"{HASH}  {name}\n", "sums")
    assert one_line(caught.value)


def test_a_source_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text('{"text": "Un."}\n')
    with pytest.raises(FatalError, match=r"the file name .*udcff\.jsonl' is not UTF-8; rename it") as caught:
        take_snapshot(CorpusSettings(url=str(tmp_path)))
    assert one_line(caught.value)


@pytest.mark.parametrize("name", ["a\x1b[31m.jsonl", "a\x07.jsonl", "a\u202eb.jsonl"])
def test_an_error_about_a_source_of_any_name_commands_no_terminal(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / name).write_text("garbage\n")
    settings = CorpusSettings(url=str(folder))
    (source,) = take_snapshot(settings).sources
    with pytest.raises(FatalError, match="unknown schema") as caught:
        shard_source(Store(tmp_path / "store"), source, settings)
    assert one_line(caught.value)
    assert caught.value.file.isprintable()


def test_odd_but_harmless_names_become_plain_labels_and_stay_inside(tmp_path: Path) -> None:
    names = (
        "-rf.jsonl",
        "é ü.jsonl",
        "$(id).jsonl",
        "a" * 240 + ".jsonl",
        "[red]x[red].jsonl",
        "%2e%2e.jsonl",
        "....jsonl",
    )
    folder = tmp_path / "deep" / "corpus"
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_text(json.dumps({"text": f"Un {number}."}) + "\n")
    settings = CorpusSettings(url=str(folder))
    sources = take_snapshot(settings).sources
    assert len({source.label for source in sources}) == len(sources) >= len(names) - 1  # hidden files are ignored
    assert all(
        set(source.label) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        for source in sources
    )
    store = Store(tmp_path / "deep" / "store")
    for source in sources:
        shard_source(store, source, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["corpus", "store"]


def test_the_corpus_folder_may_be_a_link_but_nothing_in_it_may_lead_out(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.jsonl").write_text('{"text": "Un."}\n')
    (tmp_path / "link").symlink_to(real)
    assert [source.name for source in take_snapshot(CorpusSettings(url=str(tmp_path / "link"))).sources] == ["a.jsonl"]
    (real / "b.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(FatalError, match=r"b\.jsonl is a link that is broken or points outside the corpus folder"):
        take_snapshot(CorpusSettings(url=str(tmp_path / "link")))


@pytest.mark.parametrize(
    "name", ["../x", "/x", ".", "..", "", "a/b", "a\n", "a\0", "a" * 101, "a b", "é", "-x", "[b]x"]
)
def test_names_of_recipes_and_models_are_plain(name: str) -> None:
    with pytest.raises(FatalError, match=r"^form: name: "):
        make_recipe(recipe_values(name=name), "form")
    with pytest.raises(FatalError, match=r"^form: register\.name: "):
        make_recipe(recipe_values(register={"name": name}), "form")


@pytest.mark.parametrize("value", ["a\0b", "m" * 5000, "../../../etc/passwd", "a\nb"])
def test_a_path_in_a_recipe_may_be_anything_and_does_not_break_it(tmp_path: Path, value: str) -> None:
    (tmp_path / "tiny.toml").write_text(
        f'name = "tiny"\ncorpus.url = {json.dumps(value)}\nteacher.model = {json.dumps(value)}\n'
    )
    loaded = load_recipe(tmp_path / "tiny.toml")
    assert loaded.teacher.model in (value, str(tmp_path / value))
    with pytest.raises(FatalError):
        take_snapshot(loaded.corpus)


@pytest.mark.parametrize("path", ["a\0b.toml", "m" * 5000, "."])
def test_a_recipe_file_of_an_impossible_name(tmp_path: Path, path: str) -> None:
    with pytest.raises(FatalError, match=r"not a readable TOML file|this recipe file does not exist"):
        load_recipe(tmp_path / path)


@pytest.mark.parametrize("name", [*OUT, "", 5, None])
def test_a_receipt_names_no_file_outside_its_artifact(tmp_path: Path, name: Any) -> None:
    """Also if the seal matches: any program that can write to a store can seal, and its files are copied from there."""
    store = Store(tmp_path / "store")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "Un."}\n')
    settings = CorpusSettings(url=str(tmp_path / "corpus"))
    (source,) = take_snapshot(settings).sources
    body = json.loads(shard_source(store, source, settings).to_json())
    assert body.pop("seal")
    body["files"][0]["name"] = name
    sealed = canonical_json(body | {"seal": sha256_bytes(canonical_json(body))})
    with pytest.raises(FatalError, match="not a receipt of this version") as caught:
        receipt_from_json(sealed, "x.receipt.json")
    assert one_line(caught.value)


def test_an_error_shows_no_escape_codes_and_survives_the_way_between_processes() -> None:
    error = FatalError("a \x1b[31mred\x1b[0m\r file\nb \udcff é", "x\x07")
    assert str(error) == "a \\x1b[31mred\\x1b[0m\\r file\nb \\udcff é"
    assert error.file == "x\\x07"
    again = FatalError(*error.args)
    assert again.args == error.args
    assert printable(printable("\\\x1b")) == printable("\\\x1b")
    os.fsencode(str(error))


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b"{}", b'{"seal": NaN, "a": NaN}', b'{"a": "\\ud800"}', b"\xff", b"5", b""]
)
def test_what_is_no_receipt_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(FatalError, match="distil verify"):
        receipt_from_json(data, "x.receipt.json")
