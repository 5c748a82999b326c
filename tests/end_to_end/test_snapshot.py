"""A later snapshot costs its new and changed sources, and what was estimated from the first one is reused."""

from pathlib import Path

from tests.harness.project import History, Shell, new_artifacts
from tests.harness.tiny import write_oscar


def test_only_changed_and_added_sources_are_computed(
    history: History, shell: Shell, corpus_copy: Path, tmp_path: Path
) -> None:
    project = history.project.copy(tmp_path / "project", corpus=corpus_copy)
    later = write_oscar(tmp_path / "later", parts=4)
    lines = (later / "fr_meta_part_4.jsonl").read_bytes().splitlines(keepends=True)
    (corpus_copy / "fr_meta_part_1.jsonl").write_bytes(b"".join(lines[:30]))
    (corpus_copy / "fr_meta_part_4.jsonl").write_bytes(b"".join(lines[30:]))
    before = project.creation_times()

    result = shell("prepare", project.recipe)
    assert result.status == 0, result.err
    fresh = new_artifacts(before, project.creation_times())
    assert {label for kind, label in fresh if kind == "source"} == {"fr_meta_part_1", "fr_meta_part_4"}
    assert {kind for kind, _ in fresh} == {"source", "shard", "blocks", "targets"}
    assert all(label.startswith(("fr_meta_part_1", "fr_meta_part_4")) for _, label in fresh)

    again = shell("prepare", project.recipe)
    assert again.status == 0, again.err
    assert "nothing to do" in again.out
