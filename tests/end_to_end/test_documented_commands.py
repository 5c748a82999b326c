"""Commands as the README and docker/README.md print them: the chapter "Your corpus and teacher", backup and restore.

pytest -m "" tests/end_to_end/test_documented_commands.py

Only what a reader replaces is replaced: the corpus, the teacher, the model and the version. `mine.toml` extends a
recipe with tiny settings, so that a run takes seconds.
"""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.harness.markdown import code_blocks
from tests.harness.processes import kill, started_for
from tests.harness.project import REPO, Result, ended, environment, start_program
from tests.harness.recipe_values import recipe_toml
from tests.harness.servers.up import running_up
from tests.harness.tiny import make_teacher, write_oscar

pytestmark = [pytest.mark.slow, pytest.mark.guard]

CHAPTER = (REPO / "README.md").read_text(encoding="utf-8").split("## Your corpus and teacher")[1].split("\n## ")[0]
RECIPE, COMMANDS, PYTHON = (code_blocks(CHAPTER, language)[0] for language in ("toml", "sh", "python"))
SERVERS = (REPO / "docker/README.md").read_text(encoding="utf-8")
BACKUP, RESTORE = code_blocks(SERVERS.split("**Backup** works")[1], "sh")
"""The lines for `distil up` without Docker."""
OUTPUT = {
    "plan": "one training run",
    "run": "mine version 1, alias challenger, champion",
    "prepare": "nothing to do",
    "status": "targets",
    "retry": "nothing to do",
    "deploy": "watch-snapshots/mine",
    "watch": "nothing new: corpus",
    "score": "held-out top-1",
    "promote": "it is already the champion",
    "verify": "all artifacts exist and are undamaged",
    "gc": "0 files would be deleted",
}
"""An excerpt of the output of each command."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the root of a checkout, with `mine.toml` of the README."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "deployments").symlink_to(REPO / "deployments")
    corpus, teacher = write_oscar(folder / "corpus"), folder / "teacher"
    make_teacher(teacher, layers=6)
    (folder / "tiny.toml").write_text(recipe_toml(corpus=corpus, teacher=teacher), encoding="utf-8")
    mine = RECIPE.replace("/data/my-corpus", str(corpus)).replace("camembert-base", str(teacher))
    (folder / "mine.toml").write_text(f'extends = "tiny.toml"\n{mine}', encoding="utf-8")
    yield folder
    for process in started_for(folder):
        kill(process.pid)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """The results of the chapter's commands except `up`, which runs from its line on until all others have ended."""
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        for line in COMMANDS.splitlines():
            name, *words = shlex.split(line, comments=True)[1:]
            if name == "up":
                stack.enter_context(services(folder, *words))
            else:
                results[name] = call("distil", name, *as_a_reader(words), folder=folder)
    return results


def test_every_command_of_the_chapter(results: dict[str, Result]) -> None:
    assert results.keys() == OUTPUT.keys()
    wrong = {name: one for name, one in results.items() if one.status or OUTPUT[name] not in one.out + one.err}
    assert wrong == {}


@pytest.mark.usefixtures("results")
def test_the_model_answers_in_transformers(folder: Path) -> None:
    code = PYTHON.replace("models/demo", "models/mine").replace('pipeline("fill', 'answers = pipeline("fill')
    result = call("python", "-c", f"{code}\nprint(len(answers), answers[0]['sequence'])", folder=folder)
    assert result.status == 0, result.err
    assert result.out.startswith("5 Le contrat de travail est")


@pytest.mark.usefixtures("results")
@pytest.mark.skipif(not shutil.which("sqlite3"), reason="the documented backup calls sqlite3")
def test_a_backup_of_running_services_can_be_restored(folder: Path) -> None:
    with services(folder, "mine.toml"):
        bash(BACKUP, folder)
    shutil.rmtree(folder / ".distil")
    bash(RESTORE, folder)
    for command, sentence in (("verify", "all artifacts exist and are undamaged"), ("run", "nothing to do")):
        result = call("distil", command, "mine.toml", folder=folder)
        assert sentence in result.out, result.err
    client = MlflowClient(f"sqlite:///{folder}/.distil/mlflow/mlflow.db")
    champion = client.get_model_version_by_alias("mine", "champion")
    assert int(champion.version) == 1
    assert [one.path for one in client.list_artifacts(champion.run_id)]


def call(program: str, *words: str, folder: Path) -> Result:
    """Runs a program of this virtual environment in a folder."""
    return ended(start_program([Path(sys.executable).with_name(program), *words], folder, environment(folder)))


def as_a_reader(words: list[str]) -> list[str]:
    """Replaces what a reader replaces: the model, and the version of `promote`."""
    values = {"MODEL": ".distil/models/mine", "3": "1"}
    return [values.get(word, word) for word in words if word != "..."]


@contextmanager
def services(folder: Path, *words: str) -> Iterator[None]:
    """Runs `distil up WORDS` and stops it with Ctrl-C. No process of it is left."""
    with running_up(folder, environment(folder), *map(Path, words), home="") as up:
        yield
        assert up.stop(signal.SIGINT) == 0
        assert "all services stopped" in up.output
        assert started_for(folder) == []


def bash(script: str, folder: Path) -> None:
    """Runs lines of a guide in a folder; the first line that fails ends them."""
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True)
