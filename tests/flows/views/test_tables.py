"""Tables of failures and results: any text from a corpus must stay text."""

from flows.views.tables import CELL_CHARACTERS, Table, failure_rows, how_to_retry, how_to_retry_all, markdown
from storage.artifact import Failure
from tasks.recipe.config import Recipe
from tests.harness.recipe_values import simple_recipe

HOSTILE = 'x | <img src=x onerror="alert(1)"> [click](javascript:alert(1)) `a`\n# title \x1b[31m'


def recipe(name: str) -> Recipe:
    return simple_recipe(name=name)


def failure(message: str) -> Failure:
    return Failure("blocks", "", "part-0001", "FatalError", message, False, message, 7, "", "")


def test_a_retry_is_the_command_of_the_user_or_the_deployment_of_the_run() -> None:
    (row,) = failure_rows(recipe("mine"), [failure("bad")], "proof/a.toml 'corpus.url=/my data'")
    assert row["how to retry"] == "distil retry proof/a.toml 'corpus.url=/my data' --stage blocks --shard part-0001"
    (row,) = failure_rows(recipe("mine"), [failure("bad")])
    assert "run retry-shard/mine with stage = blocks and shard = part-0001" in row["how to retry"]


def test_a_name_that_the_shell_would_split_is_quoted() -> None:
    assert how_to_retry(recipe("mine"), "source", "l'an 1", "mine.toml") == (
        """distil retry mine.toml --stage source --shard 'l'"'"'an 1'"""
    )


def test_the_remedy_depends_on_who_started_the_run() -> None:
    assert "the command in the last column" in how_to_retry_all(recipe("mine"), "mine.toml")
    assert "retry-shard/mine" in how_to_retry_all(recipe("mine"))


def test_a_cell_is_one_printable_line_of_bounded_length() -> None:
    (row,) = failure_rows(recipe("mine"), [failure(HOSTILE), failure("y" * 10 * CELL_CHARACTERS)][:1])
    for cell in (row["file"], row["error"]):
        assert cell.isprintable()
        assert r"\n# title \x1b[31m" in cell
    (row,) = failure_rows(recipe("mine"), [failure("y" * 10 * CELL_CHARACTERS)])
    assert len(row["error"]) == CELL_CHARACTERS + 1


def test_a_table_of_names_and_values_shows_text_as_it_is() -> None:
    text = markdown(Table("mine", {"scores": [("a|b", HOSTILE)], "empty": []}))
    assert "## scores" in text
    assert "empty" not in text
    (row,) = [line for line in text.splitlines() if "onerror" in line]
    assert "<" not in row.replace("<br>", "")  # its lines
    assert r"\[click\]" in row
    assert row.replace(r"\|", "").count("|") == 3


def test_a_table_shows_text_as_it_is() -> None:
    shown = markdown(Table("a_b", {"": [["one\ntwo", HOSTILE]]}, ["model", HOSTILE]))
    heading, _, *rows = shown.splitlines()
    assert heading == r"# a\_b"
    assert len(rows) == 3
    assert rows[2].startswith("| one<br>two | ")
    for row in rows:
        assert "<" not in row.replace("<br>", "")
        assert row.replace(r"\|", "").count("|") == 3
