"""Standings from scores: which sets decide, by which figure and protocol, and what was not run."""

from tasks.eval.scores import not_run
from tasks.release.results import Standing, protocols, standings


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
    found = standings(scores)
    assert found == (
        Standing("heldout", "top1", (0.5,), error=0.01),
        Standing("xnli", "accuracy", (0.7, 0.8)),
        Standing("ner", "entity_f1", (0.9,)),
        Standing("paws-x", "accuracy", reason="no such folder"),
        Standing("fine-tuning", "", reason="no protocol"),
    )
    assert protocols(scores) == {one.set_name: "p" if one.set_name == "heldout" else "none" for one in found}
    assert [Standing.from_json(one.to_json()) for one in found] == list(found)
