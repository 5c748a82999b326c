"""What people read of failures and results: text from a corpus can be anything and must stay text."""

import pytest

from flows.home import TYPED_COMMAND
from flows.views.tables import CELL_CHARACTERS, all_again, failure_rows, how_to_retry, markdown_sheet, markdown_tables
from storage.artifact import Failure
from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe

HOSTILE = 'x | <img src=x onerror="alert(1)"> [click](javascript:alert(1)) `a`\n# title \x1b[31m'


def recipe(name: str) -> Recipe:
    return make_recipe({"name": name, "corpus": {"url": "x"}, "teacher": {"model": "y"}}, "test")


def failure(message: str) -> Failure:
    return Failure("blocks", "", "part-0001", "FatalError", message, False, message, 7, "", "")


def test_the_command_is_that_of_the_user_and_of_a_deployed_run_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED_COMMAND, "proof/a.toml 'corpus.url=/my data'")
    (row,) = failure_rows(recipe("mine"), [failure("bad")])
    assert row["how to retry"] == "distil retry proof/a.toml 'corpus.url=/my data' --stage blocks --shard part-0001"
    monkeypatch.delenv(TYPED_COMMAND)
    (row,) = failure_rows(recipe("mine"), [failure("bad")])
    assert "run retry-shard/mine with stage = blocks and shard = part-0001" in row["how to retry"]


def test_a_name_that_the_shell_would_take_apart_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED_COMMAND, "mine.toml")
    assert how_to_retry(recipe("mine"), "source", "l'an 1") == (
        """distil retry mine.toml --stage source --shard 'l'"'"'an 1'"""
    )


def test_what_can_be_done_about_a_table_depends_on_who_started_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED_COMMAND, "mine.toml")
    assert "the command in the last column" in all_again(recipe("mine"))
    monkeypatch.delenv(TYPED_COMMAND)
    assert "retry-shard/mine" in all_again(recipe("mine"))


def test_a_cell_is_one_printable_line_of_bounded_length() -> None:
    (row,) = failure_rows(recipe("mine"), [failure(HOSTILE), failure("y" * 10 * CELL_CHARACTERS)][:1])
    for cell in (row["file"], row["error"]):
        assert cell.isprintable()
        assert r"\n# title \x1b[31m" in cell
    (row,) = failure_rows(recipe("mine"), [failure("y" * 10 * CELL_CHARACTERS)])
    assert len(row["error"]) == CELL_CHARACTERS + 1


def test_a_sheet_shows_text_as_it_is() -> None:
    sheet = markdown_sheet("mine", {"scores": [("a|b", HOSTILE)]})
    (row,) = [line for line in sheet.splitlines() if "onerror" in line]
    assert "<" not in row.replace("<br>", "")  # its lines
    assert r"\[click\]" in row
    assert row.replace(r"\|", "").count("|") == 3


def test_a_table_shows_text_as_it_is() -> None:
    shown = markdown_tables({"a_b": (["model", HOSTILE], [["one\ntwo", HOSTILE]])})
    heading, _, *rows = shown.splitlines()
    assert heading == r"# a\_b"
    assert len(rows) == 3
    assert rows[2].startswith("| one<br>two | ")
    for row in rows:
        assert "<" not in row.replace("<br>", "")
        assert row.replace(r"\|", "").count("|") == 3
