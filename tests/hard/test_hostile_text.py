"""Checks that untrusted text is escaped in the terminal, in tables, in model cards and in errors."""

import json
from pathlib import Path

import pytest

from flows.views import tables
from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tasks.recipe.config import CorpusSettings
from tasks.release.markdown import code_span, escape_line

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31m"
HOSTILE = f"[bold]b[/bold]{ESCAPE} [/] | <script>x</script> ![i](http://h) `c` \u202e\udcff"
CODES = set("\x1b\x07\u202e\udcff\r\0")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the text that was printed, and checks that it contains no control codes."""
    text = capsys.readouterr().out
    assert not CODES & set(text)
    return text


def test_tables_on_a_screen_hold_no_codes_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_table(tables.Table(HOSTILE, {HOSTILE: [("name", HOSTILE), (HOSTILE, "two\nlines")]}))
    assert "[bold]b[/bold]" in shown(capsys)
    tables.show_table(tables.Table(HOSTILE, {"": [[HOSTILE, "two\nlines"]]}, ("one", HOSTILE)))
    assert "[bold]b[/bold]" in shown(capsys)
    tables.show_table(tables.failure_table([{"error": tables.plain(HOSTILE)}]))
    assert "[bold]b[/bold]" in shown(capsys)


def test_a_card_takes_no_codes() -> None:
    assert escape_line(HOSTILE).isprintable()
    assert code_span(HOSTILE).isprintable()
    assert "<script>" not in escape_line(HOSTILE)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.jsonl", json.dumps({HOSTILE.replace("\udcff", ""): "x", "b" * 100_000: "y"})),
        ("a.jsonl", f"not json {ESCAPE}"),
        ("a.csv", f"id,{ESCAPE}"),
    ],
)
def test_what_a_file_holds_is_told_in_one_short_plain_line(tmp_path: Path, name: str, line: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / name).write_text(line + "\n", encoding="utf-8")
    settings = CorpusSettings(url=str(folder))
    (source,) = take_snapshot(settings).sources
    with pytest.raises(FatalError, match="unknown schema") as caught:
        shard_source(Store(tmp_path / "store"), source, settings)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_hostile_documents_are_kept_as_they_are(tmp_path: Path) -> None:
    """Documents are data: their text is stored unchanged."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    text = HOSTILE.replace("\udcff", "")
    (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    settings = CorpusSettings(url=str(folder), heldout_per_mille=0)
    (source,) = take_snapshot(settings).sources
    assert shard_source(Store(tmp_path / "store"), source, settings).info["counts"]["bytes"] == len(text.encode())
