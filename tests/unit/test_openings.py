"""Openings that many dialogues of a source share are keyed by more turns, all others by the first turn."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import openings
from common.data.openings import FirstTurnCounter, KeyRule, all_keys
from common.data.options import naming_flags
from common.data.split import dialogue_hash, parse_split_by, prefix_hashes
from common.errors import UserError

TURN = st.sampled_from(["Hello", "hi", "who?", "Why?"]) | st.text(st.characters(codec="ascii"), min_size=1, max_size=2)
DIALOGUES = st.lists(st.lists(TURN, min_size=1, max_size=5), min_size=1, max_size=60)


def rule(dialogues) -> KeyRule:
    counter = FirstTurnCounter()
    for turns in dialogues:
        counter.add(turns)
    return KeyRule("auto", counter.shared())


def keyed(dialogues, turns) -> tuple[int, str]:
    key = rule(dialogues).key(turns)
    return key.turns, key.text


def test_the_first_of_the_hashes_is_the_one_of_the_first_turn_alone():
    assert prefix_hashes(["Hello  THERE", "b"])[0] == dialogue_hash("hello there")
    assert prefix_hashes(["Hello", "B  b"]) == prefix_hashes([" hello", "b B"])
    assert len({*prefix_hashes(["a", "b", "c"]), *prefix_hashes(["ab", "c"]), *prefix_hashes(["a", "bc"])}) == 6


@pytest.mark.parametrize("sharing, others, turns", [(4, 0, 1), (5, 0, 2), (5, 400, 2), (10, 990, 1), (11, 989, 2)])
def test_an_opening_is_extended_when_more_than_a_hundredth_and_more_than_four_share_it(sharing, others, turns):
    dialogues = [["Hello", f"q{i}"] for i in range(sharing)] + [[f"question {i}"] for i in range(others)]
    assert rule(dialogues).key(["HELLO", "q3"]).turns == turns
    assert all(rule(dialogues).key([f"question {i}"]).turns == 1 for i in range(others)[:20])


def test_a_shared_beginning_of_several_turns_is_extended_past_its_end():
    dialogues = [["Hello", "Who are you?", f"q{i}", "thanks"] for i in range(30)]
    assert keyed(dialogues, dialogues[7]) == (3, "hello\0who are you?\0q7")


def test_neither_rows_of_one_prompt_nor_prompts_that_continue_one_another_make_an_opening_shared():
    long = [f"turn {i}" for i in range(20)]
    assert not rule([long[:n] for n in range(1, 21)]).shared
    assert not rule([["Hello", "q"]] * 100 + [["Hello"]] * 100).shared


def test_a_prompt_that_continues_another_goes_with_it():
    dialogues = [["Hello", f"q{i}"] for i in range(40)]
    chosen = rule(dialogues)
    assert chosen.key(["Hello", "q3", "and then?"]) == chosen.key(["hello", "Q3"])
    assert chosen.key(["Hello", "q3"]).dialogue != chosen.key(["Hello", "q4"]).dialogue


def test_a_dialogue_that_is_only_the_shared_opening_has_its_own_key():
    key = rule([["Hello", f"q{i}"] for i in range(40)] + [["Hello"]]).key(["Hello"])
    assert (key.text, key.turns) == ("Hello", 1)
    assert key.dialogue not in all_keys(["Hello", "q1"])  # a dialogue held out does not take it along


@settings(deadline=None)
@given(DIALOGUES, st.randoms(use_true_random=False))
def test_order_repetition_and_beginnings_of_dialogues_do_not_matter(dialogues, chance: random.Random):
    again = dialogues + [turns[: chance.randint(1, len(turns))] for turns in dialogues] + dialogues[:3]
    chance.shuffle(again)
    assert rule(again) == rule(dialogues)


@settings(deadline=None)
@given(DIALOGUES)
def test_the_key_is_a_beginning_that_every_continuation_shares(dialogues):
    chosen = rule(dialogues)
    for turns in dialogues:
        key = chosen.key(turns)
        assert key.dialogue in all_keys(turns)
        continued = chosen.key([*turns, "and then?"])
        if prefix_hashes(turns)[key.turns - 1] not in chosen.shared:  # it does not end within a shared opening
            assert continued == key


@settings(deadline=None)
@given(DIALOGUES)
def test_dialogues_are_counted_as_a_list_of_them_would(dialogues):
    folded = {tuple(prefix_hashes(turns)) for turns in dialogues}
    longest = [turns for turns in folded if not any(len(o) > len(turns) and o[: len(turns)] == turns for o in folded)]
    through = {}
    for turns in longest:
        for hash_ in turns:
            through[hash_] = through.get(hash_, 0) + 1
    assert rule(dialogues).shared == {h for h, count in through.items() if count > max(0.01 * len(longest), 4)}


def test_memory_is_freed_without_a_difference(monkeypatch):
    dialogues = [["Hello", f"q{i % 50}", f"r{i}"] for i in range(300)] * 3
    expected = rule(dialogues)
    monkeypatch.setattr(openings, "_MANY", 64)
    counter = FirstTurnCounter()
    for turns in dialogues:
        counter.add(turns)
    assert counter.shared() == expected.shared
    assert len(counter._hashes) == 1 + 50 + 300


def test_other_ways_to_key():
    turns = ["Hello", "q", "r"]
    shared = frozenset(prefix_hashes(turns)[:1])
    assert KeyRule("opening").key(turns).text == "Hello"
    assert KeyRule("auto", shared).key(turns).text == "hello\0q"
    whole = KeyRule("prompt").key(turns)
    assert whole.text == "hello\0q\0r" and whole.dialogue != KeyRule("prompt").key([*turns, "s"]).dialogue


@pytest.mark.parametrize("bad", ["column", "column:", "column: ", "Auto", "row"])
def test_an_unknown_split_by_is_named(bad):
    with pytest.raises(UserError, match="--split_by.*auto, opening, prompt or column:NAME"), naming_flags():
        parse_split_by(bad)
    assert parse_split_by("column:conv id") == "conv id" and parse_split_by("prompt") is None
