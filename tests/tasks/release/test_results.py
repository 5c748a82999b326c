"""Standings from scores: which sets decide, by which figure and protocol, and what was not run."""

from tasks.eval.scores import not_run
from tasks.release.results import SetResult, protocol_keys, set_results


def test_the_figure_of_every_set():
    scores = {
        "heldout": {"top1": 0.5, "top1_se": 0.01, "kl": 0.3, "protocol": "p"},
        "fill-mask": {"rows": []},
        "size-and-speed": {"parameters": {}},
        "xnli": {"runs": {"0": {"accuracy": 0.7, "macro_f1": 0.6}, "1": {"accuracy": 0.8, "macro_f1": 0.6}}},
        "ner": {"runs": {"0": {"entity_f1": 0.9}}},
        "paws-x": not_run("no such folder"),
        "fine-tuning": not_run("no protocol"),
    }
    found = set_results(scores)
    assert found == (
        SetResult("heldout", "top1", (0.5,), error=0.01),
        SetResult("xnli", "accuracy", (0.7, 0.8)),
        SetResult("ner", "entity_f1", (0.9,)),
        SetResult("paws-x", "accuracy", reason="no such folder"),
        SetResult("fine-tuning", "", reason="no protocol"),
    )
    assert protocol_keys(scores) == {one.set_name: "p" if one.set_name == "heldout" else "none" for one in found}
    assert [SetResult.from_json(one.to_json()) for one in found] == list(found)
