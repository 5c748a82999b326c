"""Shards and blocks do not depend on how many workers made them, nor on the store."""

from pathlib import Path

from tests.harness.project import History, Shell, make_project

KINDS = ("source", "shard", "blocks")


def test_one_worker_and_an_empty_store_give_the_bytes_of_three_workers(
    history: History, teacher: Path, shell: Shell, tmp_path: Path
) -> None:
    alone = make_project(tmp_path, history.project.folder / "corpus", teacher, run={"workers": 1})
    result = shell("prepare", alone.recipe, "targets.source=online")
    assert result.status == 0, result.err
    mine = {(one.kind, one.key, one.label): one.files for one in alone.receipts(*KINDS)}
    theirs = {(one.kind, one.key, one.label): one.files for one in history.project.receipts(*KINDS)}
    assert {kind for kind, _, _ in mine} == set(KINDS)
    assert len([label for kind, _, label in mine if kind == "shard"]) > 3, "no source was cut into several shards"
    # The history has shards of a broken source too, which belong to nothing.
    assert mine == {one: theirs[one] for one in theirs if one in mine}
    assert {key for kind, key, _ in theirs if kind == "blocks"} == {key for kind, key, _ in mine if kind == "blocks"}
