"""The README and the guides agree with the code: commands, options, fields, variables, files and links exist.

pytest tests/test_guides.py
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from tasks.recipe.config import Recipe
from tasks.recipe.load import load_recipe, make_recipe
from tests.harness.markdown import FENCED, code_blocks

REPO = Path(__file__).resolve().parent.parent
GUIDES = (
    "README.md",
    "deployments/README.md",
    "deployments/cluster/README.md",
    "deployments/score/README.md",
    "docker/README.md",
    "tests/benchmarks/results/README.md",
)
LINES, WORDS = 170, 1500
"""Maximum length of README.md."""
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"")
SECTIONS = {field.alias or name for name, field in Recipe.model_fields.items() if "." not in name}
FIELD = re.compile(r"^([a-z_]+)\.([a-z_]+)(?:\s*=.*)?$")
"""`section.field` or `section.field = value`."""
VARIABLE = re.compile(r"\b(?:PREFECT|MLFLOW)_[A-Z_]+\b")


@pytest.fixture(params=GUIDES)
def guide(request: pytest.FixtureRequest) -> Path:
    return REPO / str(request.param)


def test_readme_is_short() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert len(text.split()) <= WORDS


def test_links_lead_to_files(guide: Path) -> None:
    targets = [first or second for first, second in LINK.findall(guide.read_text(encoding="utf-8"))]
    missing = [target for target in targets if "://" not in target and not (guide.parent / target).exists()]
    assert missing == []


def test_commands_exist_with_their_options(guide: Path) -> None:
    commands = _commands()
    for line in _distil_lines(guide):
        name, *words = shlex.split(line.removeprefix("distil "), comments=True)
        assert name in commands, line
        options = {option for parameter in commands[name].params for option in parameter.opts}
        given = {word for word in words if word.startswith("--") and word != "--help"}
        assert given <= options, f"{guide.name}: {line}: {sorted(given - options)}"


def test_overrides_name_fields_of_a_recipe(guide: Path) -> None:
    """Settings on a command line and inline `section.field` in the text."""
    text = guide.read_text(encoding="utf-8")
    words = [word for line in _distil_lines(guide) for word in line.split() if re.match(r"[a-z_.]+=", word)]
    names = [word.partition("=")[0] for word in words]
    for code in INLINE.findall(text):
        if (found := FIELD.match(code)) and found[1] in SECTIONS:
            names.append(f"{found[1]}.{found[2]}")
    assert [name for name in names if not _is_field(name)] == []


def test_toml_blocks_are_parts_of_valid_recipes(guide: Path, tmp_path: Path) -> None:
    for text in code_blocks(guide.read_text(encoding="utf-8"), "toml"):
        values = tomllib.loads(text)
        if base := values.pop("extends", ""):
            path = tmp_path / "mine.toml"
            path.write_text(text.replace(base, str((guide.parent / base).resolve())), encoding="utf-8")
            load_recipe(path)
        else:
            plain: dict[str, Any] = {"name": "any", "corpus": {"url": "any"}, "teacher": {"model": "any"}}
            make_recipe(plain | values, guide.name)


def test_modules_exist(guide: Path) -> None:
    modules = set(re.findall(r"python -m ([a-z_.]+)", guide.read_text(encoding="utf-8")))
    for module in modules:
        path = REPO / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_prefect_and_mlflow_know_the_variables(guide: Path) -> None:
    from mlflow import environment_variables
    from prefect import settings

    used = set(VARIABLE.findall(guide.read_text(encoding="utf-8")))
    # Names of docker/.env, which compose passes on under other names.
    ours = set(re.findall(r"^(\w+)=", (REPO / "docker" / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    server = {"MLFLOW_BACKEND_STORE_URI"}  # an option of `mlflow server`
    unknown = {name for name in used - ours - server if not hasattr(settings, name)}
    assert {name for name in unknown if not hasattr(environment_variables, name)} == set()


@pytest.mark.parametrize(
    ("name", "text", "field", "default"),
    [
        ("README.md", "One file per 128 MB of text", "corpus.shard_bytes", 128_000_000),
        ("README.md", "512 ids per", "blocks.length", 512),
        ("README.md", "int8 Arrow", "targets.encoding", "int8"),
        ("deployments/README.md", "`corpus.max_unpacked_ratio` (200)", "corpus.max_unpacked_ratio", 200),
        ("deployments/README.md", "(`run.retries`, 2)", "run.retries", 2),
        ("deployments/README.md", "`run.max_failed` (0)", "run.max_failed", 0),
        ("deployments/cluster/README.md", "(`run.retries`, 2)", "run.retries", 2),
        ("deployments/cluster/README.md", "`run.cache_bytes` (50 GB)", "run.cache_bytes", 50_000_000_000),
        ("deployments/score/README.md", "(`gate.deviations`, 2,", "gate.deviations", 2.0),
        ("deployments/score/README.md", "`gate.min_tolerance`, 0.005)", "gate.min_tolerance", 0.005),
        ("deployments/score/README.md", "(`gate.approval_hours`, 72)", "gate.approval_hours", 72.0),
    ],
)
def test_the_guides_state_the_defaults_of_the_recipe(name: str, text: str, field: str, default: object) -> None:
    assert text in (REPO / name).read_text(encoding="utf-8")
    section, _, attribute = field.partition(".")
    recipe = make_recipe({"name": "any", "corpus": {"url": "any"}, "teacher": {"model": "any"}}, "any")
    assert getattr(getattr(recipe, section), attribute) == default


def test_the_guides_state_the_limits_of_servers_and_transfers() -> None:
    from flows.pipeline.task_policy import GRACE_SECONDS
    from flows.services.auth import MIN_CHARACTERS
    from flows.services.servers import RETENTION
    from storage.files.filesystem import PARALLEL_PARTS, PART_BYTES
    from storage.garbage_collection import DAY

    days = int(RETENTION["PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD"]) // 86_400
    numbers = {1: "one", 2: "two", 4: "four", 8: "eight"}
    stated = {
        "docker/README.md": (
            f"get {GRACE_SECONDS:.0f} s to write",
            f"at least {MIN_CHARACTERS} characters",
            f"after {days} days",
        ),
        "deployments/cluster/README.md": (f"parts of {PART_BYTES // 2**20} MiB, {numbers[PARALLEL_PARTS]} at a time",),
        "deployments/README.md": ("older than a day",),
    }
    assert DAY == 86_400.0
    missing = [
        text
        for name, texts in stated.items()
        for text in texts
        if text not in (REPO / name).read_text(encoding="utf-8")
    ]
    assert missing == []


def _commands() -> dict[str, Any]:
    """The commands of `distil` by name, as typer makes them."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    return commands


def _distil_lines(guide: Path) -> list[str]:
    """Every `distil COMMAND ...` of the shell blocks and of the inline code."""
    text = guide.read_text(encoding="utf-8")
    lines = [line for block in code_blocks(text, "sh") for line in block.splitlines()]
    lines += INLINE.findall(FENCED.sub("", text))
    return [line for line in lines if re.match(r"distil [a-z]", line)]


def _is_field(name: str) -> bool:
    """True for `name` and `section.field` of a recipe."""
    section, _, field = name.rpartition(".")
    if not section:
        return name in Recipe.model_fields
    owner = Recipe.model_fields["register_as" if section == "register" else section].annotation
    return owner is not None and field in owner.model_fields
