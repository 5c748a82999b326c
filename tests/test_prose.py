"""The project's prose is plain technical English: phrases that only insiders understand fail, with the words to write.

python -m tests.test_prose [PATH ...]          all findings, of the whole checkout or below these paths
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
EXEMPT = "deployments/demo/make_corpus.py"
"""It reads fact sheets of the French administration, and calls them sheets."""
RECORDS = "tests/benchmarks/results/2*.md"
"""Tables as a program wrote them on that date."""
FOLDERS = ("flows", "tasks", "storage", "tests", "docker", "deployments", ".ci")
SUFFIXES = (".py", ".md", ".toml", ".yaml", ".sh")
SHOWN = 40
UNITS = "bytes|[kMG]B|rows|tokens|blocks|positions|seconds|milliseconds|ms|files|tasks|jobs|megabytes|kilobytes"
PER = (
    "position|token|step|shard|stage|row|block|document|kind|source|second|run|job|file|minute|hour|day|batch|set|model|"
    "line|sentence|vector|worker|process|value|task|push"
)
INSTEAD = {
    r"anew": "again",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"foretold": "predicted, forecast",
    r"bystanders?": "another process, another run",
    r"crown(?:s|ed|ing)?": "make champion",
    r"so many": "the number: `N`, `count`",
    r"told": "passed, set, reported, notified",
    r"whoever": "the user, the caller, the reader",
    r"(?<![/\"'`])(?:no|some)body": "no process, another process, the user",
    r"(?:the|a) teacher's word": "the teacher's hidden state, the teacher's distribution",
    rf"(?:{UNITS}) an? (?:{PER})": "`per`, not `a`: bytes per position",
    r"(?:go|goes|went|going) on": "continue, resume",
    r"by itself": "automatically, alone",
    r"beside": "next to, alongside",
    r"(?:lies?|lay) (?:in|at|on|beside|below|under|next)": "is in",
    r"(?:makes?|made) something of": "use, read",
    r"(?:is|are|was|were) not there|(?:that|what|which) (?:is|are|was|were) there": "exists, does not exist",
    r"asks? for|asked for": "request",
    r"rooms?": "package, free space",
    r"(?<!fact )(?<!\")sheets?": "table, report",
    r"pictures?": "figure, plot",
    r"pace": "speed, timings",
    r"rivals?": "evaluated model",
    r"judged": "scored, compared",
    r"(?<!distil\.)standings?": "result",
}
"""Each phrase (case does not matter) and what to write instead."""
BANNED = [(re.compile(rf"(?<![\w-])(?:{phrase})(?![\w-])", re.IGNORECASE), plain) for phrase, plain in INSTEAD.items()]
OPENING = (re.compile(r'"""(?:What|Who|Whoever|Of) '), "start with the subject, not with What, Who or Of")


class Finding(NamedTuple):
    """One banned phrase, and what to write instead of it."""

    file: str
    line: int
    phrase: str
    plain: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.phrase!r} -> {self.plain}"

    @property
    def package(self) -> str:
        """`flows`, `tasks/train`, `tests`."""
        first, *rest = self.file.split("/")
        return f"{first}/{rest[0]}" if first in ("tasks", "tests") and len(rest) > 1 else first


def files(paths: Sequence[str] = ()) -> Iterator[Path]:
    """The project's own text files, but for this one."""
    roots = [REPO / path for path in paths or FOLDERS]
    found: Iterable[Path] = (path for root in roots for path in ([root] if root.is_file() else root.rglob("*")))
    top = () if paths else REPO.iterdir()
    exempt = {Path(__file__).resolve(), REPO / EXEMPT}
    for path in sorted({*found, *top} - exempt):
        is_record = path.relative_to(REPO).match(RECORDS)
        if path.suffix in SUFFIXES and path.is_file() and not is_record:
            yield path


def findings(path: Path) -> Iterator[Finding]:
    """All banned phrases of a file."""
    text = path.read_text(encoding="utf-8")
    for pattern, plain in (*BANNED, OPENING):
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Finding(str(path.relative_to(REPO)), line, match.group(), plain)


def report(found: Sequence[Finding], shown: int | None = None) -> str:
    """How many findings each package has, then the findings."""
    counts = Counter(one.package for one in found)
    lines = [f"{count:>5} {package}" for package, count in sorted(counts.items())]
    return "\n".join([f"{len(found)} phrases", *lines, *map(str, sorted(found)[:shown])])


def test_prose_is_plain_technical_english() -> None:
    found = [one for path in files() for one in findings(path)]
    if found:
        pytest.fail(f"{report(found, SHOWN)}\nall of them: python -m tests.test_prose", pytrace=False)


def test_a_banned_phrase_is_found_with_its_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    (tmp_path / "a.py").write_text('"""What is made.\n\n8 bytes a\nposition, 9 bytes a token; besides, ANEW."""\n')
    assert [(one.line, one.phrase) for one in sorted(findings(tmp_path / "a.py"))] == [
        (1, '"""What '),
        (4, "ANEW"),
        (4, "bytes a token"),
    ]


if __name__ == "__main__":
    found = [one for path in files(sys.argv[1:]) for one in findings(path)]
    print(report(found))
    sys.exit(bool(found))
