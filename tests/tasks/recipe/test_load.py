"""Recipe files: inheritance, overrides, relative paths, and the bundled recipes."""

from pathlib import Path

import pytest

from storage.errors import FatalError
from tasks.recipe.load import load_recipe, make_recipe, with_absolute_paths
from tasks.release.promotion_rule import promotion_verdict
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


def test_recipe_is_merged_over_its_base_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(BASE)
    (tmp_path / "texts").mkdir()
    (tmp_path / "nested" / "teacher").mkdir(parents=True)
    nested = tmp_path / "nested" / "small.toml"
    nested.write_text(
        'extends = "../small.toml"\n[corpus]\nmin_chars = 20\n[gate]\noptional = ["ner"]\n[run]\nworkers = 8\n'
    )
    recipe = load_recipe(nested, ["corpus.max_chars=500"])
    assert (recipe.name, recipe.corpus.min_chars, recipe.corpus.max_chars, recipe.run.workers) == ("small", 20, 500, 8)
    assert recipe.gate.optional == ("ner",)
    # Relative paths are resolved against the folder of the file first, then against that of its base.
    assert recipe.corpus.url == str(tmp_path / "texts")
    assert recipe.teacher.model == str(tmp_path / "nested" / "teacher")


def test_circular_and_missing_bases_are_named(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a"), ("c", "absent")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"\n')
    with pytest.raises(FatalError, match=r"a\.toml: this recipe extends itself"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(FatalError, match=r"absent\.toml: this recipe file does not exist"):
        load_recipe(tmp_path / "c.toml")


def test_cluster_recipe_differs_only_in_where_it_runs(repo: Path) -> None:
    single = load_recipe(repo / "deployments" / "oscar-2301.toml").model_dump()
    cluster = load_recipe(repo / "deployments" / "cluster" / "oscar-2301.toml").model_dump()
    different = {section for section in single if single[section] != cluster[section]}
    assert different == {"store", "corpus", "run", "ray", "train", "register_as"}
    assert {name for name in single["train"] if single["train"][name] != cluster["train"][name]} == {"ranks"}
    assert {name for name in single["corpus"] if single["corpus"][name] != cluster["corpus"][name]} == {"url"}


@pytest.mark.parametrize("name", ["demo", "pilot", "oscar-2019", "oscar-2301", "cluster/oscar-2301"])
def test_first_champion_of_bundled_recipe_must_reach_its_floors(repo: Path, name: str) -> None:
    rules = load_recipe(repo / "deployments" / f"{name}.toml").gate
    broken = [SetResult(set_name, "top1", (0.01,)) for set_name in rules.needed]
    fair = [SetResult(set_name, "top1", (0.45,)) for set_name in rules.needed]
    rules = rules.model_copy(update={"optional": ("fine-tuning",)})
    assert "heldout is 0.0100, below its floor" in " ".join(promotion_verdict(broken, [], rules).reasons)
    assert promotion_verdict(fair, [], rules).promote


def test_home_and_store_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\nhome = "state"\n[corpus]\nurl = "c"\n[teacher]\nmodel = "t"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for overrides, store in (
        ([], f"{tmp_path}/state/store"),
        (["store=elsewhere"], f"{tmp_path}/elsewhere"),
        (["store=s3://a/b"], "s3://a/b"),
    ):
        recipe = load_recipe(path, overrides)
        assert (recipe.home, recipe.store) == (f"{tmp_path}/state", store)


def test_form_values_get_default_or_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"name": "x", "corpus": {"url": "c"}, "teacher": {"model": "t"}}
    for home, store, expected in (
        ("", "", (f"{tmp_path}/.distil", f"{tmp_path}/.distil/store")),
        ("state", "elsewhere", (f"{tmp_path}/state", f"{tmp_path}/elsewhere")),
        ("/a", "s3://b/c", ("/a", "s3://b/c")),
    ):
        recipe = with_absolute_paths(make_recipe(values | {"home": home, "store": store}, "form"))
        assert (recipe.home, recipe.store) == expected
        assert with_absolute_paths(recipe) == recipe


@pytest.mark.parametrize("name", ["pilot", "oscar-2019", "oscar-2301", "cluster/oscar-2301"])
def test_micro_batch_for_camembert_base_has_at_most_64_blocks(repo: Path, name: str) -> None:
    recipe = load_recipe(repo / "deployments" / f"{name}.toml")
    assert 0 < recipe.train.micro_rows * recipe.blocks.length <= 64 * 512  # fits 24 GB by estimate, not measured
    assert recipe.train.batch_rows % recipe.train.micro_rows == 0
