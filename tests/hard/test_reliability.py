"""Checks that the tests in tests/RELIABILITY.md exist and run when it says, and that records update its figures."""

import ast
import json
from pathlib import Path

import pytest

from tests.hard.reliability import COLUMNS, FILE, SOURCE, read_records, record, rewritten, rows_of

TABLE = f"""# Title

| {" | ".join(COLUMNS)} |
|---|---|---|---|---|---|
| damage | found | `tests/hard/test_a.py` | `tests/hard/test_a.py`, `tests.hard.a` | 1 passed | 2026-01-01 |
| other | found | `tests/hard/test_b.py` | `pytest tests/hard/test_b.py` | 2 passed | 2026-01-01 |

The end.
"""


def test_records_become_the_figures_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "records"))
    record("tests/hard/test_a.py", {"planted": 700, "passed": 9})
    record("tests/hard/test_a.py", {"planted": 400})
    record("tests.hard.a", "flat for 350 runs")
    text = rewritten(TABLE, read_records(tmp_path / "records"))
    first, second = rows_of(text)
    assert first["figures"] == "flat for 350 runs; 1,100 planted, 9 passed"
    assert first["date"] == json.loads((tmp_path / "records").read_text().splitlines()[0])["date"] > "2026-01-01"
    assert (second["figures"], second["date"]) == ("2 passed", "2026-01-01")
    assert text.startswith("# Title\n")
    assert text.endswith("\nThe end.\n")


def test_without_records_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE, raising=False)
    record("tests.hard.a", "not recorded")
    assert rewritten(TABLE, read_records(tmp_path / "absent")) == TABLE


def runs_on_every_push(path: Path) -> bool:
    """Returns True if one of the file's tests is a guard or is not slow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [ast.unparse(one) for one in tree.body if isinstance(one, ast.Assign) and "pytestmark" in ast.unparse(one)]
    tests = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")]
    decorators = [" ".join([*marks, *map(ast.unparse, one.decorator_list)]) for one in tests]
    return any("mark.guard" in one or "mark.slow" not in one for one in decorators)


def test_every_row_names_a_guard_of_each_push_and_an_attack_of_each_night(repo: Path) -> None:
    rows = rows_of((repo / "tests" / "RELIABILITY.md").read_text(encoding="utf-8"))
    for row in rows:
        guards, attacks = (SOURCE.findall(row[column]) for column in ("every push", "every night"))
        assert guards, row["attack"]
        assert attacks, row["attack"]
        for name in (*guards, *attacks):
            assert (repo / name).is_file() or (repo / f"{name.replace('.', '/')}.py").is_file(), name
        assert all(runs_on_every_push(repo / name) for name in guards), row["attack"]
