"""Bad input by the command line: status 1, one sentence, no traceback; everything else is done."""

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from storage.verify import verify
from tests.harness.mounts import remount
from tests.harness.output import refusal, tables
from tests.harness.project import History, Project, Result, Shell, make_project
from tests.harness.tiny import documents

HASH = "0" * 64


def record(text: str) -> bytes:
    """A line as OSCAR 23.01 has it, with a null where its metadata may have one."""
    metadata = {"identification": {"label": "fr", "prob": 0.9}, "harmful_pp": None, "quality_warnings": None}
    return json.dumps({"content": text, "metadata": metadata}).encode()


def lines(seed: int, end: bytes = b"\n") -> bytes:
    return b"".join(record(text) + end for text in documents(30, seed=seed))


@dataclass(frozen=True)
class Mixed:
    """One `distil prepare` over good, bad and worse files."""

    project: Project
    result: Result


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, teacher: Path, shell: Shell) -> Mixed:
    folder = tmp_path_factory.mktemp("mixed")
    corpus = folder / "corpus"
    corpus.mkdir()
    good = lines(1)
    bad = [b"{not json", b'{"content": "caf\xe9"}', record("x" * 30_000), b"[1, 2]"]
    files = {
        "windows.jsonl": b"\xef\xbb\xbf" + lines(2, end=b"\r\n"),
        "few-bad.jsonl": good + b"".join(line + b"\n" for line in bad),
        "many-bad.jsonl": good + b"{not json\n" * 11,
        "unknown.jsonl": b'{"title": "Le maire", "number": 1}\n' * 20,
        "empty.jsonl": b"",
        "cut-zstd.jsonl.zst": zstandard.ZstdCompressor().compress(good)[:-40],
        "cut-gzip.jsonl.gz": gzip.compress(good)[:-40],
        "differs.jsonl": lines(3),
        "fr_sha256.txt": f"{HASH} differs.jsonl\n".encode(),
    }
    for name, data in files.items():
        (corpus / name).write_bytes(data)
    project = make_project(folder, corpus, teacher)
    result = shell("prepare", project.recipe, "targets.source=online", "corpus.max_line_bytes=20_000")
    return Mixed(project, result)


REFUSED = {
    "many-bad": ("many-bad.jsonl", "11"),
    "unknown": ("unknown.jsonl", "title"),
    "empty": ("empty.jsonl", "empty"),
    "cut-zstd": ("cut-zstd.jsonl.zst", ""),
    "cut-gzip": ("cut-gzip.jsonl.gz", ""),
    "differs": ("differs.jsonl", HASH[:8]),
}


def test_a_run_over_bad_sources_ends_with_one_sentence(mixed: Mixed) -> None:
    assert f"and {len(REFUSED) - 1} more" in refusal(mixed.result)


@pytest.mark.parametrize("label", REFUSED)
def test_each_bad_source_is_in_the_table_with_file_and_reason(mixed: Mixed, label: str) -> None:
    heading, *rows = tables(mixed.result.out)
    assert len(rows) == len(REFUSED)
    (row,) = [dict(zip(heading, row, strict=True)) for row in rows if row[1] == label]
    file, reason = REFUSED[label]
    assert row["file"] == file
    assert file in row["error"]
    assert reason in row["error"]


def test_good_sources_are_done_and_bad_ones_are_not(mixed: Mixed) -> None:
    sources = {receipt.label: receipt for receipt in mixed.project.receipts("source")}
    assert sources.keys() == {"windows", "few-bad"}
    assert sources["windows"].info["counts"]["documents"] == 30
    assert sources["windows"].info["counts"]["bad"] == 0
    assert sources["few-bad"].info["counts"]["documents"] == 30
    assert sources["few-bad"].info["counts"]["bad"] == 4
    quarantine = mixed.project.store.verified_folder(sources["few-bad"]) / "quarantine.jsonl"
    assert [json.loads(line)["line"] for line in quarantine.read_text().splitlines()] == [31, 32, 33, 34]
    blocks = {receipt.label.rsplit("-", 1)[0] for receipt in mixed.project.receipts("blocks")}
    assert blocks == {"windows", "few-bad"}
    assert verify(mixed.project.store) == []


def test_status_names_every_bad_source(mixed: Mixed, shell: Shell) -> None:
    status = shell("status", mixed.project.recipe, "corpus.max_line_bytes=20_000")
    failed = [line for line in status.out.splitlines() if line.startswith("failed ")]
    assert all(any(REFUSED[label][0] in line for line in failed) for label in REFUSED)
    assert len(failed) == len(REFUSED)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["loss.distil=-1"], "loss.distil"),
        (["loss.cosine=nan"], "loss.cosine"),
        (["loss.distil=0", "loss.cosine=0", "loss.mlm=0"], "loss"),
        (["targets.encoding=topk"], "loss.cosine"),
        (["train.speed=9"], "train.speed"),
        (["blocks.length=long"], "blocks.length"),
        (["corpus.url=EMPTY"], "corpus.url"),
        (["corpus.url=nowhere"], "nowhere"),
        (["corpus.pattern=*.parquet"], "*.parquet"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_made(
    settings: list[str], field: str, teacher: Path, history: History, shell: Shell, tmp_path: Path
) -> None:
    project = make_project(tmp_path, history.project.folder / "corpus", teacher)
    (tmp_path / "empty").mkdir()
    result = shell("run", project.recipe, *(text.replace("EMPTY", str(tmp_path / "empty")) for text in settings))
    assert field in refusal(result)
    assert project.creation_times() == {}


def test_a_teacher_without_weights_is_refused(history: History, teacher: Path, shell: Shell, tmp_path: Path) -> None:
    project = history.project.copy(tmp_path / "project")
    folder = shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    said = refusal(shell("run", project.recipe, f"teacher.model={folder}"))
    assert str(folder) in said
    assert "no weights" in said


def test_a_tokenizer_that_does_not_fit_the_teacher_is_refused(
    history: History, teacher: Path, shell: Shell, tmp_path: Path
) -> None:
    project = history.project.copy(tmp_path / "project")
    folder = tmp_path / "words"
    folder.mkdir()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"mot{number}" for number in range(500))]
    words = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    said = refusal(shell("run", project.recipe, f"blocks.tokenizer={folder}"))
    assert str(folder) in said
    assert "505 tokens" in said
    assert str(teacher) in said


def test_a_small_store_is_refused_and_a_full_one_filled_up_later(
    history: History, teacher: Path, shell: Shell, small_disk: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", history.project.folder / "corpus", teacher)
    project.home.mkdir()
    (project.home / "store").symlink_to(small_disk)
    command = ("prepare", project.recipe, "targets.source=online")
    said = refusal(shell(*command))
    assert "too little free space" in said
    assert str(project.store.root) in said
    assert project.creation_times() == {}
    remount(small_disk, "size=160k")  # enough for the data, but not for files of complete pages
    assert "is full" in refusal(shell(*command))
    assert verify(project.store) == []
    remount(small_disk, "size=20m")
    result = shell(*command)
    assert result.status == 0, result.err
    after = project.creation_times()
    assert {label for kind, label, _ in after if kind == "source"} == {f"fr_meta_part_{number}" for number in (1, 2, 3)}


def test_a_read_only_store_is_refused(
    history: History, teacher: Path, shell: Shell, small_disk: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", history.project.folder / "corpus", teacher)
    remount(small_disk, "ro,size=20m")
    assert "read-only" in refusal(
        shell("prepare", project.recipe, f"store={small_disk}/store", "targets.source=online")
    )


@pytest.mark.parametrize("arguments", [["run"], ["distill", "x.toml"], ["status", "x.toml", "--nope"]])
def test_bad_usage_ends_with_2(arguments: list[str], shell: Shell) -> None:
    result = shell(*arguments)
    assert result.status == 2
    assert "Usage" in result.err


def test_the_command_itself_ends_with_these(history: History) -> None:
    """As processes: what the shell above says is what `distil` does."""
    assert "loss.mlm" in refusal(history.project.distil("run", "loss.mlm=-1"))
    process = history.project.start("run", "--nope")
    assert process.wait() == 2
    process.communicate()
