"""Locations of the sets of a protocol, and errors for missing and incomplete sets."""

import pytest

from storage.errors import FatalError
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.load import load_set
from tasks.eval.protocol import SetPlan
from tests.harness.eval_sets import write_ner, write_pairs, write_reviews


def test_sets_load_from_the_folder_in_the_recipe(tmp_path):
    write_pairs(tmp_path / "xnli" / "fr")
    write_ner(tmp_path / "wikiner")
    write_reviews(tmp_path / "cls")
    assert load_set("xnli", SetPlan(hub="facebook/xnli", folder="fr", path="xnli/fr"), str(tmp_path)).name == "xnli"
    assert load_set("ner", SetPlan(path="wikiner"), str(tmp_path)).name == "ner"
    assert load_set("cls-dvd", SetPlan(path="cls"), f"{tmp_path}/").name == "cls-dvd"


def test_locations():
    plan = SetPlan(hub="facebook/xnli", folder="fr", path="xnli/fr", revision="abc")
    assert plan.location("xnli", "") == SetLocation("facebook/xnli", "fr", "abc")
    assert plan.location("xnli", "s3://bucket/eval/") == SetLocation("s3://bucket/eval/xnli/fr")
    with pytest.raises(FatalError, match=r"cls-books is not on the hub; set score\.sets to the folder"):
        SetPlan(path="cls").location("cls-books", "")


def test_number_of_rows_must_equal_the_protocol(tmp_path):
    write_pairs(tmp_path, train=40)
    load_set("xnli", SetPlan(rows={"train": 40}), str(tmp_path))
    with pytest.raises(FatalError, match="the train split of xnli has 40 rows, but the protocol expects 392702"):
        load_set("xnli", SetPlan(rows={"train": 392_702}), str(tmp_path))


def test_set_on_the_hub_fails_at_once_when_offline(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FatalError, match=r"data set facebook/xnli is neither .* nor in the Hub cache.*HF_HUB_OFFLINE"):
        load_set("xnli", SetPlan(hub="facebook/xnli", folder="fr"))
