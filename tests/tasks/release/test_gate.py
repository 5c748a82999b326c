"""The gate: who may become champion, and the sentence that says why."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.recipe.config import GateSettings
from tasks.recipe.load import make_recipe
from tasks.release.gate import MEAN, Row, Verdict, judge, pooled_sd, tolerance
from tasks.release.results import SetResult

RULES = GateSettings(needed=("heldout",), deviations=2.0, min_tolerance=0.005)


def heldout(*values: float) -> SetResult:
    return SetResult("heldout", "top1", values)


def ner(*values: float) -> SetResult:
    return SetResult("ner", "entity_f1", values)


CHAMPION = (heldout(0.46), ner(0.870, 0.876, 0.873))
"""The spread of ner is 0.003, so it may fall by 0.006; heldout by 0.005."""


def row(verdict: Verdict, name: str) -> Row:
    (found,) = (row for row in verdict.rows if row.set_name == name)
    return found


def test_a_better_one_is_promoted() -> None:
    verdict = judge((heldout(0.47), ner(0.880, 0.886, 0.883)), [CHAMPION], RULES)
    assert verdict.promote
    assert "heldout rose by 0.0100, from 0.4600 to 0.4700" in verdict.reasons
    assert any(reason.startswith("the mean over sets rose") for reason in verdict.reasons)


def test_an_equal_one_is_promoted() -> None:
    verdict = judge(CHAMPION, [CHAMPION], RULES)
    assert verdict.promote
    assert "ner is 0.8730, equal to the best so far" in verdict.reasons


def test_one_set_beyond_its_tolerance_refuses_however_much_the_other_rose() -> None:
    verdict = judge((heldout(0.60), ner(0.860, 0.866, 0.863)), [CHAMPION], RULES)
    assert not verdict.promote
    assert verdict.reasons == (
        "ner fell by 0.0100, from 0.8730 to 0.8630, more than its tolerance of 0.0060 "
        "(2 standard deviations over seeds)",
    )
    assert row(verdict, "heldout").passed


def test_a_fall_within_tolerance_is_forgiven_on_one_set_but_not_in_the_mean() -> None:
    one = judge((heldout(0.46), ner(0.867, 0.873, 0.870)), [CHAMPION], RULES)
    assert one.promote
    assert row(one, "ner").note.endswith("within its tolerance of 0.0060 (2 standard deviations over seeds)")
    both = judge((heldout(0.4555), ner(0.867, 0.873, 0.870)), [CHAMPION], RULES)
    assert not both.promote
    assert all(row(both, name).passed for name in ("heldout", "ner"))
    (reason,) = both.reasons
    assert "more than one standard error" in reason


def test_the_standard_error_of_the_mean_is_that_of_a_difference() -> None:
    verdict = judge(CHAMPION, [CHAMPION], RULES)
    seeds = math.sqrt(0.003**2 * (1 / 3 + 1 / 3) + 0.0025**2 * 2)
    assert row(verdict, MEAN).tolerance == pytest.approx(seeds / 2)


@pytest.mark.parametrize("candidate", [(heldout(0.9),), (heldout(0.9), SetResult("ner", "", (), "the set is away"))])
def test_an_incomplete_one_is_refused_unless_the_set_is_optional(candidate: tuple[SetResult, ...]) -> None:
    verdict = judge(candidate, [CHAMPION], RULES)
    assert not verdict.promote
    (reason,) = verdict.reasons
    assert reason.startswith("ner was not run: " + (candidate[-1].reason or "there is no score of it"))
    assert judge(candidate, [CHAMPION], RULES.model_copy(update={"optional": ("ner",)})).promote


def test_a_set_that_was_not_run_blocks_a_first_model_too() -> None:
    assert not judge((heldout(0.9), SetResult("ner", "", (), "away")), [], RULES).promote
    assert not judge((ner(0.9),), [], RULES).promote  # heldout is needed
    assert not judge((), [], RULES).promote
    nothing = judge((), [], GateSettings(needed=(), optional=("ner",)))
    assert nothing.reasons == ("not one set was run",)


def test_a_first_model_is_judged_by_floors() -> None:
    rules = RULES.model_copy(update={"floors": {"heldout": 0.4}})
    assert judge((heldout(0.4), ner(0.1)), [], rules).promote
    low = judge((heldout(0.39), ner(0.9)), [], rules)
    assert low.reasons == ("heldout is 0.3900, below its floor 0.4; there is no champion yet",)
    later = judge((heldout(0.39),), [(heldout(0.39),)], rules)
    assert later.promote  # floors are for what has nothing to be compared with


def test_a_set_that_no_champion_has_goes_by_its_floor() -> None:
    rules = RULES.model_copy(update={"floors": {"xnli": 0.6}})
    new = SetResult("xnli", "accuracy", (0.5, 0.51))
    verdict = judge((*CHAMPION, new), [CHAMPION], rules)
    assert verdict.reasons == ("xnli is 0.5050, below its floor 0.6; no champion has this set",)


def test_small_steps_down_do_not_add_up() -> None:
    """Each is within tolerance of the one before, the third is beyond that of the first."""
    champions: list[tuple[SetResult, ...]] = [(heldout(0.500),)]
    promoted = []
    for value in (0.497, 0.494, 0.491):
        verdict = judge((heldout(value),), champions, RULES)
        promoted.append(verdict.promote)
        champions.append((heldout(value),))
    assert promoted == [True, False, False]


def test_bests_of_different_champions_are_not_one_model() -> None:
    """An equal of the present champion is promoted although no model ever had the best of each set."""
    old, now = (heldout(0.46), ner(0.877)), (heldout(0.52), ner(0.873))
    assert judge(now, [old, now], RULES).promote


def test_single_seeds_have_the_least_tolerance() -> None:
    assert pooled_sd(heldout(0.4), heldout(0.5)) == 0.0
    assert tolerance(heldout(0.4), heldout(0.5), RULES) == 0.005
    assert pooled_sd(ner(0.1, 0.2, 0.3), ner(0.5)) == pytest.approx(0.1)


score = st.floats(0, 1)


@given(st.lists(score, min_size=1, max_size=4), st.lists(score, min_size=1, max_size=4))
def test_who_is_not_below_is_never_refused(candidate: list[float], best: list[float]) -> None:
    one, other = heldout(*candidate), heldout(*best)
    verdict = judge((one,), [(other,)], RULES)
    assert verdict.promote or one.mean < other.mean
    assert verdict.reasons


def test_rules_that_contradict_each_other_are_refused() -> None:
    values = {"name": "x", "corpus": {"url": "x"}, "teacher": {"model": "y"}}
    for gate in ({"needed": ["ner"], "optional": ["ner"]}, {"floors": {"ner": 87}}):
        with pytest.raises(Exception, match="ner"):
            make_recipe(values | {"gate": gate}, "test")
