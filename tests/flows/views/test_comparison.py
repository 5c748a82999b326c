"""Tables of several models: cells, intervals, ratios, what was not run, agreement under the mask."""

import json
from typing import Any

from flows.scoring.record_scores import plain_figures
from flows.views.comparison import agreement, comparison_table, fill_mask_table, notes
from flows.views.tables import markdown
from tasks.eval.intervals import over_seeds
from tasks.eval.scores import not_run


def tuned(*values: float, **more: Any) -> dict[str, Any]:
    summary = {"accuracy": over_seeds(values), "macro_f1": over_seeds(values)}
    counts = {split: {"rows": 9, "kept": 8, "dropped": 1} for split in ("train", "validation", "test")}
    runs = {str(seed): {"accuracy": value} for seed, value in enumerate(values)}
    return {
        "metric": "accuracy",
        "lr": 1e-3,
        "rule": "as published",
        "counts": counts,
        "runs": runs,
        "summary": summary,
    } | more


def answers(*tokens: str) -> list[dict[str, Any]]:
    return [{"token": token, "probability": 0.25} for token in tokens]


RATIO = {"ratio": {"value": 0.9, "low": 0.85, "high": 0.95}, "difference": {"value": -0.07, "low": -0.1, "high": -0.04}}
HELDOUT = {"top1": 0.4, "top1_se": 0.01, "perplexity": 20.0, "kl": 0.3, "agreement": 0.7}
TEACHERS = {"teacher_top1": 0.5, "teacher_top1_se": 0.01, "teacher_perplexity": 10.0}
MODELS = {
    "small": {
        "heldout": HELDOUT | TEACHERS | {"against_teacher": RATIO},
        "fill-mask": {
            "top": 5,
            "rows": [
                {"sentence": "A <mask>", "answers": {"small": answers("x", "y"), "teacher": answers("x", "z")}},
                {"sentence": "B <mask>", "answers": {"small": answers("u", "v"), "teacher": answers("v", "u")}},
            ],
        },
        "size-and-speed": {
            "parameters": {"small": {"with_head": 1000}, "teacher": {"with_head": 2000}},
            "bytes": {"small": 4000, "teacher": 8000},
            "latency": {"tokens": 128, "runs": {"1": 3}, "ms": {"small": {"1": 2.0}, "teacher": {"1": 4.0}}},
        },
        "xnli": tuned(0.6, 0.7, 0.65, against_teacher=RATIO),
        "ner": not_run("no such folder"),
    },
    "control": {
        "heldout": HELDOUT
        | {
            "kl": 0.9,
            "by_block": {"hits": [1]},
            "against_first": {
                "difference": {"value": -0.01, "low": -0.015, "high": -0.005},
                "kl_difference": {"value": 0.6, "low": 0.5, "high": 0.7},
            },
        },
        "xnli": tuned(0.5, 0.5, 0.5),
        "ner": not_run("no such folder"),
    },
    "teacher": {"heldout": {"top1": 0.5, "top1_se": 0.01, "perplexity": 10.0}, "xnli": not_run("seed 2 is missing")},
}


def test_one_column_per_model_and_the_ratio_of_the_first_to_its_teacher() -> None:
    table = comparison_table("all", MODELS)
    header, rows = table.header, table.sections[""]
    assert header == ["", "small", "control", "teacher", "small / teacher"]
    found = {row[0]: row[1:] for row in rows}
    assert found["held-out top-1, %"] == ["40.0 ± 2.0", "40.0 ± 2.0", "50.0 ± 2.0", "0.900 [0.850, 0.950]"]
    assert found["KL to the teacher, nats"] == ["0.300", "0.900", "", ""]
    # t at three seeds: 4.303 x 0.05 / sqrt(3)
    assert found["xnli accuracy, %"] == ["65.0 ± 12.4", "50.0 ± 0.0", "not run", "0.900 [0.850, 0.950]"]
    assert found["ner"] == ["not run", "not run", "", ""]
    assert found["parameters"] == ["1,000", "", "2,000", "0.50"]
    assert found["CPU ms, batch 1, 128 tokens"] == ["2.0", "", "4.0", "0.50"]
    assert {len(row) for row in rows} == {len(header)}


def test_without_a_protocol_the_teacher_is_known_from_held_out_text() -> None:
    alone = {"small": {part: MODELS["small"][part] for part in ("heldout", "size-and-speed")}}
    table = comparison_table("alone", alone)
    assert table.header == ["", "small", "teacher", "small / teacher"]
    assert table.sections[""][0] == ["held-out top-1, %", "40.0 ± 2.0", "50.0 ± 2.0", "0.900 [0.850, 0.950]"]
    own = {"small": {"heldout": {"top1": 0.4, "top1_se": 0.01, "perplexity": 2.0}}}
    assert comparison_table("own", own).header == ["", "small"]


def test_columns_keep_their_order_when_the_store_has_sorted_the_names() -> None:
    models = {"zeta" if name == "small" else name: dict(scores) for name, scores in MODELS.items()}
    text = json.dumps(MODELS["small"]).replace('"small"', '"zeta"')
    models["zeta"] = json.loads(json.dumps(json.loads(text), sort_keys=True))
    table = fill_mask_table(models)
    assert table is not None
    assert table.header == ["sentence", "zeta", "teacher"]
    assert {row[0]: row[-1] for row in comparison_table("sorted", models).sections[""]}["parameters"] == "0.50"


def test_what_was_not_run_is_noted_with_its_reason() -> None:
    lines = notes(MODELS | {"other": {"heldout": HELDOUT | {"note": "by its own tokenizer"}}})
    assert ("heldout (other)", "by its own tokenizer") in lines
    assert ("ner (small, control)", "not run: no such folder") in lines
    assert ("xnli (teacher)", "not run: seed 2 is missing") in lines
    assert any(name == "xnli" and "train 8 (1 dropped)" in text for name, text in lines)
    said = "heldout top1 -1.0 [-1.5, -0.5] points, KL to the teacher +0.600 [+0.500, +0.700] nats"
    assert ("control minus small", said) in lines
    assert ("", "learning rate small 0.001, control 0.001") in lines


def test_fill_mask_side_by_side_with_agreement() -> None:
    table = fill_mask_table(MODELS)
    assert table is not None
    assert table.header == ["sentence", "small", "teacher"]
    rows = table.sections[""]
    assert rows[0] == ["A <mask>", "x 25 %\ny 25 %", "x 25 %\nz 25 %"]
    assert rows[-1] == ["top-1 agreement with teacher", "1 of 2, 1.5 of 5 tokens shared", ""]
    assert agreement(MODELS["small"]["fill-mask"], "small", "small") == ""
    assert fill_mask_table({"small": {}}) is None
    assert "x 25 %<br>y 25 %" in markdown(table)


def test_figures_have_the_same_names_for_every_model() -> None:
    ours, theirs = (plain_figures(MODELS[name]["xnli"]) for name in ("small", "control"))
    assert ours["accuracy"] == over_seeds((0.6, 0.7, 0.65))["mean"]
    assert {"accuracy.sd", "accuracy.low", "accuracy.high", "macro_f1", "lr"} <= set(theirs)
    assert set(ours) - set(theirs) == {
        f"against_teacher.{name}{part}" for name in ("ratio", "difference") for part in ("", ".low", ".high")
    }
    heldout = plain_figures(MODELS["control"]["heldout"])
    assert heldout["against_first.kl_difference.low"] == 0.5
    assert {name: heldout[name] for name in HELDOUT} == HELDOUT | {"kl": 0.9}
    assert "by_block" not in heldout
