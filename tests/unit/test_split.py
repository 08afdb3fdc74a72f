"""A dialogue's phase and side depend on its first user turn and on nothing else."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.split import Assignment, assignment, check_eval_fraction, normalised, parse_data_split
from common.errors import UserError

EVEN = "1,1,1"


def tally(data_split, eval_fraction, count=6000):
    found = [assignment(f"question {number}", data_split, eval_fraction) for number in range(count)]
    return [sum(a.phase == phase for a in found) / count for phase in range(3)], found


@pytest.mark.parametrize("data_split", ["2,4,4", (2, 4, 4), "1,0,0", "0,1,1", "0.5,0.25,0.25"])
def test_phases_get_their_shares(data_split):
    shares = parse_data_split(data_split)
    got, found = tally(data_split, 0.1)
    for phase, share in enumerate(shares):
        expected = share / sum(shares)
        assert abs(got[phase] - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(found))
        in_phase = [a.is_eval for a in found if a.phase == phase]
        if in_phase:  # the evaluation share holds within each phase
            assert abs(sum(in_phase) / len(in_phase) - 0.1) <= 5 * math.sqrt(0.09 / len(in_phase))


def test_no_evaluation_when_its_fraction_is_zero():
    assert not any(a.is_eval for a in tally(EVEN, 0.0)[1])


@given(st.text(), st.floats(0, 0.99))
def test_growing_the_evaluation_share_never_moves_a_prompt_back_to_training(turn, fraction):
    smaller, larger = assignment(turn, EVEN, fraction / 2), assignment(turn, EVEN, fraction)
    assert larger.is_eval >= smaller.is_eval
    assert larger.phase == smaller.phase


@given(
    st.lists(st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=1), min_size=1),
    st.lists(st.sampled_from([" ", "\t", "\n", "\u00a0", "  "]), min_size=1),
)
def test_case_white_space_and_unicode_form_do_not_matter(words, spaces):
    plain = " ".join(words)
    spaced = "".join(word + spaces[i % len(spaces)] for i, word in enumerate(words))
    for variant in (plain.upper(), plain.swapcase(), f"\n {plain}\t", spaced):
        assert assignment(variant, "2,4,4", 0.3) == assignment(plain, "2,4,4", 0.3)


@given(st.text())
def test_all_unicode_forms_of_a_text_meet(turn):
    forms = {assignment(unicodedata.normalize(form, turn), EVEN, 0.5) for form in ("NFC", "NFD")}
    assert len(forms) == 1


def test_different_words_stay_different():
    assert normalised("Is 1 more than 2?") != normalised("Is 2 more than 1?")


def test_assignments_are_fixed_for_ever():
    """A prompt held out today is held out by every later version too: these values may never change."""
    assert assignment("What is the capital of France?", "2,4,4", 0.05) == Assignment(phase=2, is_eval=False)
    phases = [assignment(f"q{i}", "2,4,4", 0.5).phase for i in range(12)]
    assert phases == [1, 2, 0, 0, 0, 2, 1, 2, 1, 1, 2, 2]
    assert [i for i in range(12) if assignment(f"q{i}", "2,4,4", 0.5).is_eval] == [0, 1, 2, 4, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "bad", ["2,4", "2,4,4,4", "", "a,b,c", "2,,4", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1", (1, 2), (1, None, 2)]
)
def test_a_bad_data_split_is_named(bad):
    with pytest.raises(UserError, match="give three parts for the steps 1, 2 and 3, such as 2,4,4"):
        parse_data_split(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0, float("nan")])
def test_a_bad_eval_fraction_is_named(bad):
    with pytest.raises(UserError, match="give a number from 0 up to, but not including, 1"):
        check_eval_fraction(bad)
