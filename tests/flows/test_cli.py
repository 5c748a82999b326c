"""The `distil` command: quick help, exit statuses, one sentence per error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

HEAVY = {"prefect", "mlflow", "torch", "transformers", "pydantic", "pyarrow", "fsspec"}


def test_help_loads_nothing_heavy(repo: Path) -> None:
    code = "import sys, flows.cli; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_command_has_help_with_an_example(repo: Path) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    for command in vars(typer.main.get_command(app))["commands"]:
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0
        assert f"Example:  distil {command}" in shown.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run"], 2, "RECIPE.toml"),
        (["fly"], 2, "fly"),
        (["promote", "--model", "distilled", "--version", "1"], 2, "Missing argument 'RECIPE.toml'"),
        (["status", "absent.toml"], 1, "absent.toml: this recipe file does not exist"),
        (["status", "tiny.toml", "loss.mlm=-1"], 1, "loss.mlm"),
        (["status", "tiny.toml", "corpus.url=/nowhere"], 1, "corpus.url /nowhere"),
    ],
)
def test_exit_status_and_one_sentence(distil, arguments: list[str], status: int, message: str) -> None:
    done = distil(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_an_untouched_recipe(distil) -> None:
    import json

    rows = json.loads(distil("status", "tiny.toml", "--json").stdout)
    assert rows["source"]["wanted"] == 3
    assert rows["source"]["missing"] == [f"fr_meta_part_{number}" for number in (1, 2, 3)]
    assert rows["targets"]["wanted"] == 0


def test_score_takes_models_recipe_settings_and_protocol_in_any_order(monkeypatch, tmp_path) -> None:
    from typer.testing import CliRunner

    from flows import cli

    asked: list[object] = []
    monkeypatch.setattr(cli, "_recipe", lambda path, overrides: asked.append((path, overrides)))
    names = ("model", "others", "only", "force")
    monkeypatch.setattr(
        cli, "_run_flow", lambda recipe, module, flow, **given: asked.append(tuple(given[name] for name in names))
    )
    call = CliRunner().invoke
    words = ["one", "two/three", "my.toml", "score.sets=/data", "--protocol", "/p/flue.toml", "--only", "xnli seed 1"]
    assert call(cli.app, ["score", *words]).exit_code == 0
    assert asked == [
        (Path("my.toml"), ["score.sets=/data", 'score.protocol="/p/flue.toml"']),
        ("one", ("two/three",), "xnli seed 1", False),
    ]
    asked.clear()
    assert call(cli.app, ["score", "models:/demo@champion"]).exit_code == 0
    assert asked == [(cli.DEMO, []), ("models:/demo@champion", (), "", False)]
    for wrong in (["only.toml"], ["one", "a.toml", "b.toml"]):
        assert call(cli.app, ["score", *wrong]).exit_code == 2


def test_a_folder_may_contain_an_equals_sign() -> None:
    from flows.cli import _split_arguments

    words = ["runs/lr=5e-4/model", "a.toml", "runs/lr=1/b.toml", "train.lr=1e-3", "teacher.model=/data/m.toml"]
    recipes, overrides, others = _split_arguments(words)
    assert recipes == ["a.toml", "runs/lr=1/b.toml"]
    assert overrides == ["train.lr=1e-3", "teacher.model=/data/m.toml"]
    assert others == ["runs/lr=5e-4/model"]


def test_watch_requires_a_running_server(distil) -> None:
    done = distil("watch", "tiny.toml")
    assert (done.returncode, "no Prefect server was found" in done.stderr) == (1, True)


def test_gc_accepts_recipes_and_settings_only(distil) -> None:
    done = distil("gc", "tiny.toml", "corpus.url=/nowhere")
    assert (done.returncode, "corpus.url /nowhere" in done.stderr) == (1, True)
    for wrong in (["tiny.toml", "targets"], ["corpus.url=/nowhere"]):
        assert distil("gc", *wrong).returncode == 2


def test_the_command_that_verify_suggests_has_the_settings(distil) -> None:
    done = distil("verify", "tiny.toml", "blocks.length=16")
    assert "make them again with `distil retry tiny.toml blocks.length=16`" in done.stderr


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Changes that a command makes to the environment end with the test."""
    monkeypatch.setattr(os, "environ", dict(environment))


def test_the_command_to_retry_has_the_file_and_settings_that_were_typed(
    own_environment: None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import cli
    from flows.views.tables import how_to_retry

    monkeypatch.chdir(place)
    Path("far").mkdir(exist_ok=True)
    Path("far/more.toml").write_text('extends = "../tiny.toml"\n', encoding="utf-8")
    typed = Path("far/more.toml"), ["corpus.url=corpus", "score.sentences=['a b']"]
    loaded = cli._recipe(*typed)
    assert loaded.name == "tiny"
    assert how_to_retry(loaded, "blocks", "a-0", cli._command_line(*typed)) == (
        "distil retry far/more.toml corpus.url=corpus "
        """'score.sentences=['"'"'a b'"'"']' --stage blocks --shard a-0"""
    )


def test_every_command_uses_the_mlflow_of_a_running_distil_up_with_the_same_home(
    own_environment: None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import cli
    from flows.home import tracking_uri
    from flows.services import servers as server

    monkeypatch.chdir(place)
    addresses = {"prefect_api": "http://here/api", "prefect_ui": "http://here", "mlflow": "http://here:5000"}
    monkeypatch.setattr(server, "live_up", lambda home: addresses)
    assert tracking_uri(cli._recipe(Path("tiny.toml"), None)) == "http://here:5000"


def test_gc_applies_the_settings_to_every_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from flows import cli

    asked: list[object] = []

    def load(path: Path, overrides: list[str]) -> None:
        asked.append((path, overrides))
        if len(asked) == 2:
            raise KeyboardInterrupt  # the rest does not matter here

    monkeypatch.setattr(cli, "_recipe", load)
    CliRunner().invoke(cli.app, ["gc", "a.toml", "corpus.url=/data/x", "b.toml", "--delete"])
    assert asked == [(Path("a.toml"), ["corpus.url=/data/x"]), (Path("b.toml"), ["corpus.url=/data/x"])]
