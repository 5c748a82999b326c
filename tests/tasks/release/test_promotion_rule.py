"""The promotion rule: which candidates may become champion, and the reasons."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.recipe.config import GateSettings
from tasks.recipe.load import make_recipe
from tasks.release.promotion_rule import MEAN, Verdict, VerdictRow, pooled_sd, promotion_verdict, tolerance
from tasks.release.results import SetResult

RULES = GateSettings(needed=("heldout",), deviations=2.0, min_tolerance=0.005)


def heldout(*values: float) -> SetResult:
    return SetResult("heldout", "top1", values)


def ner(*values: float) -> SetResult:
    return SetResult("ner", "entity_f1", values)


CHAMPION = (heldout(0.46), ner(0.870, 0.876, 0.873))
"""The standard deviation of ner is 0.003, so ner may fall by 0.006; heldout may fall by 0.005."""


def row(verdict: Verdict, name: str) -> VerdictRow:
    (found,) = (row for row in verdict.rows if row.set_name == name)
    return found


def test_better_candidate_is_promoted() -> None:
    verdict = promotion_verdict((heldout(0.47), ner(0.880, 0.886, 0.883)), [CHAMPION], RULES)
    assert verdict.promote
    assert "heldout rose by 0.0100, from 0.4600 to 0.4700" in verdict.reasons
    assert any(reason.startswith("the mean over sets rose") for reason in verdict.reasons)


def test_equal_candidate_is_promoted() -> None:
    verdict = promotion_verdict(CHAMPION, [CHAMPION], RULES)
    assert verdict.promote
    assert "ner is 0.8730, equal to the best so far" in verdict.reasons


def test_one_set_beyond_its_tolerance_blocks_whatever_the_gain_on_another() -> None:
    verdict = promotion_verdict((heldout(0.60), ner(0.860, 0.866, 0.863)), [CHAMPION], RULES)
    assert not verdict.promote
    assert verdict.reasons == (
        "ner fell by 0.0100, from 0.8730 to 0.8630, more than its tolerance of 0.0060 "
        "(2 standard deviations over seeds)",
    )
    assert row(verdict, "heldout").passed


def test_loss_within_tolerance_passes_on_one_set_but_not_in_the_mean() -> None:
    one = promotion_verdict((heldout(0.46), ner(0.867, 0.873, 0.870)), [CHAMPION], RULES)
    assert one.promote
    assert row(one, "ner").note.endswith("within its tolerance of 0.0060 (2 standard deviations over seeds)")
    both = promotion_verdict((heldout(0.4555), ner(0.867, 0.873, 0.870)), [CHAMPION], RULES)
    assert not both.promote
    assert all(row(both, name).passed for name in ("heldout", "ner"))
    (reason,) = both.reasons
    assert "more than one standard error" in reason


def test_standard_error_of_the_mean_is_that_of_a_difference() -> None:
    verdict = promotion_verdict(CHAMPION, [CHAMPION], RULES)
    seeds = math.sqrt(0.003**2 * (1 / 3 + 1 / 3) + 0.0025**2 * 2)
    assert row(verdict, MEAN).tolerance == pytest.approx(seeds / 2)


@pytest.mark.parametrize("candidate", [(heldout(0.9),), (heldout(0.9), SetResult("ner", "", (), "the set is away"))])
def test_missing_set_blocks_unless_it_is_optional(candidate: tuple[SetResult, ...]) -> None:
    verdict = promotion_verdict(candidate, [CHAMPION], RULES)
    assert not verdict.promote
    (reason,) = verdict.reasons
    assert reason.startswith("ner was not run: " + (candidate[-1].reason or "the model has no score on it"))
    assert promotion_verdict(candidate, [CHAMPION], RULES.model_copy(update={"optional": ("ner",)})).promote


def test_missing_set_blocks_a_first_model_too() -> None:
    assert not promotion_verdict((heldout(0.9), SetResult("ner", "", (), "away")), [], RULES).promote
    assert not promotion_verdict((ner(0.9),), [], RULES).promote  # heldout is needed
    assert not promotion_verdict((), [], RULES).promote
    nothing = promotion_verdict((), [], GateSettings(needed=(), optional=("ner",)))
    assert nothing.reasons == ("no set was run",)


def test_floors_decide_about_a_first_model() -> None:
    rules = RULES.model_copy(update={"floors": {"heldout": 0.4}})
    assert promotion_verdict((heldout(0.4), ner(0.1)), [], rules).promote
    low = promotion_verdict((heldout(0.39), ner(0.9)), [], rules)
    assert low.reasons == ("heldout is 0.3900, below its floor 0.4; no champion exists yet",)
    later = promotion_verdict((heldout(0.39),), [(heldout(0.39),)], rules)
    assert later.promote  # floors apply only if there is nothing to compare with


def test_floor_decides_about_a_set_that_no_champion_has() -> None:
    rules = RULES.model_copy(update={"floors": {"xnli": 0.6}})
    new = SetResult("xnli", "accuracy", (0.5, 0.51))
    verdict = promotion_verdict((*CHAMPION, new), [CHAMPION], rules)
    assert verdict.reasons == ("xnli is 0.5050, below its floor 0.6; no champion has this set",)


def test_small_losses_do_not_add_up() -> None:
    """Each candidate is within tolerance of the one before; the second is too far below the first champion."""
    champions: list[tuple[SetResult, ...]] = [(heldout(0.500),)]
    promoted = []
    for value in (0.497, 0.494, 0.491):
        verdict = promotion_verdict((heldout(value),), champions, RULES)
        promoted.append(verdict.promote)
        champions.append((heldout(value),))
    assert promoted == [True, False, False]


def test_the_best_of_each_set_does_not_count_as_one_model_in_the_mean() -> None:
    """A candidate equal to the present champion is promoted, although past champions hold the best of some sets."""
    old, now = (heldout(0.46), ner(0.877)), (heldout(0.52), ner(0.873))
    assert promotion_verdict(now, [old, now], RULES).promote


def test_single_seeds_have_the_minimum_tolerance() -> None:
    assert pooled_sd(heldout(0.4), heldout(0.5)) == 0.0
    assert tolerance(heldout(0.4), heldout(0.5), RULES) == 0.005
    assert pooled_sd(ner(0.1, 0.2, 0.3), ner(0.5)) == pytest.approx(0.1)


score = st.floats(0, 1)


@given(st.lists(score, min_size=1, max_size=4), st.lists(score, min_size=1, max_size=4))
def test_candidate_that_is_not_below_the_best_is_never_refused(candidate: list[float], best: list[float]) -> None:
    one, other = heldout(*candidate), heldout(*best)
    verdict = promotion_verdict((one,), [(other,)], RULES)
    assert verdict.promote or one.mean < other.mean
    assert verdict.reasons


def test_contradictory_rules_are_refused() -> None:
    values = {"name": "x", "corpus": {"url": "x"}, "teacher": {"model": "y"}}
    for gate in ({"needed": ["ner"], "optional": ["ner"]}, {"floors": {"ner": 87}}):
        with pytest.raises(Exception, match="ner"):
            make_recipe(values | {"gate": gate}, "test")
