"""Recipe files: one that extends another names only what differs."""

from pathlib import Path

import pytest

from storage.errors import FatalError
from tasks.recipe.load import load_recipe, make_recipe, with_absolute_paths
from tasks.release.gate import judge
from tasks.release.results import SetResult

BASE = """
name = "small"
[corpus]
url = "texts"
min_chars = 10
[teacher]
model = "teacher"
[gate]
optional = ["ner", "xnli"]
"""


def test_a_recipe_lies_over_the_one_that_it_extends_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(BASE)
    (tmp_path / "texts").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "teacher").mkdir()
    far = tmp_path / "far" / "small.toml"
    far.write_text(
        'extends = "../small.toml"\n[corpus]\nmin_chars = 20\n[gate]\noptional = ["ner"]\n[run]\nworkers = 8\n'
    )
    recipe = load_recipe(far, ["corpus.max_chars=500"])
    assert (recipe.name, recipe.corpus.min_chars, recipe.corpus.max_chars, recipe.run.workers) == ("small", 20, 500, 8)
    assert recipe.gate.optional == ("ner",)
    # A name is looked for beside the file first and then beside the one that it extends.
    assert recipe.corpus.url == str(tmp_path / "texts")
    assert recipe.teacher.model == str(tmp_path / "far" / "teacher")


def test_circles_and_missing_files_are_named(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a"), ("c", "nobody")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"\n')
    with pytest.raises(FatalError, match=r"a\.toml: extends itself"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(FatalError, match=r"nobody\.toml: no such recipe file"):
        load_recipe(tmp_path / "c.toml")


def test_the_cluster_differs_from_the_laptop_only_in_where(repo: Path) -> None:
    here = load_recipe(repo / "deployments" / "oscar-2301.toml").model_dump()
    there = load_recipe(repo / "deployments" / "cluster" / "oscar-2301.toml").model_dump()
    differ = {section for section in here if here[section] != there[section]}
    assert differ == {"store", "corpus", "run", "ray", "train", "register_as"}
    assert {name for name in here["train"] if here["train"][name] != there["train"][name]} == {"ranks"}
    assert {name for name in here["corpus"] if here["corpus"][name] != there["corpus"][name]} == {"url"}


@pytest.mark.parametrize("name", ["demo", "pilot", "oscar-2019", "oscar-2301", "cluster/oscar-2301"])
def test_the_first_champion_of_a_bundled_recipe_needs_a_score(repo: Path, name: str) -> None:
    rules = load_recipe(repo / "deployments" / f"{name}.toml").gate
    broken = [SetResult(set_name, "top1", (0.01,)) for set_name in rules.needed]
    fair = [SetResult(set_name, "top1", (0.45,)) for set_name in rules.needed]
    rules = rules.model_copy(update={"optional": ("fine-tuning",)})
    assert "heldout is 0.0100, below its floor" in " ".join(judge(broken, [], rules).reasons)
    assert judge(fair, [], rules).promote


def test_home_and_store_are_the_same_folders_wherever_a_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "here.toml"
    path.write_text('name = "x"\nhome = "state"\n[corpus]\nurl = "c"\n[teacher]\nmodel = "t"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for overrides, store in (
        ([], f"{tmp_path}/state/store"),
        (["store=there"], f"{tmp_path}/there"),
        (["store=s3://a/b"], "s3://a/b"),
    ):
        recipe = load_recipe(path, overrides)
        assert (recipe.home, recipe.store) == (f"{tmp_path}/state", store)


def test_a_form_may_name_folders_of_the_run_s_own_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"name": "x", "corpus": {"url": "c"}, "teacher": {"model": "t"}}
    for home, store, expected in (
        ("", "", (f"{tmp_path}/.distil", f"{tmp_path}/.distil/store")),
        ("state", "there", (f"{tmp_path}/state", f"{tmp_path}/there")),
        ("/a", "s3://b/c", ("/a", "s3://b/c")),
    ):
        recipe = with_absolute_paths(make_recipe(given | {"home": home, "store": store}, "form"))
        assert (recipe.home, recipe.store) == expected
        assert with_absolute_paths(recipe) == recipe


@pytest.mark.parametrize("name", ["pilot", "oscar-2019", "oscar-2301", "cluster/oscar-2301"])
def test_one_forward_of_a_recipe_for_camembert_base_is_64_blocks_at_most(repo: Path, name: str) -> None:
    recipe = load_recipe(repo / "deployments" / f"{name}.toml")
    assert 0 < recipe.train.micro_rows * recipe.blocks.length <= 64 * 512  # fits 24 GB by estimate; not measured
    assert recipe.train.batch_rows % recipe.train.micro_rows == 0
