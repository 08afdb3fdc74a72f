"""Weights of a blend: parsed from the end of a name, and kept by prompt."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.blend import SourceSpec, parse_data_path
from common.errors import UserError, named_by


def test_only_a_trailing_number_is_a_weight():
    specs = parse_data_path(["a", "b:0.3", "builtin:courtesy", "builtin:courtesy:2", "./x/data.jsonl:1e-1", "o/n:.5"])
    assert [(spec.name, spec.weight) for spec in specs] == [
        ("a", 1.0),
        ("b", 0.3),
        ("builtin:courtesy", 1.0),
        ("builtin:courtesy", 2.0),
        ("./x/data.jsonl", 0.1),
        ("o/n", 0.5),
    ]


@pytest.mark.parametrize("bad", [["a:0"], ["a:-1"], ["a:inf"], ["a:nan"], [":0.5"], [""], ["  "], []])
def test_what_cannot_be_a_source_is_named(bad):
    with pytest.raises(UserError, match="--data_path"), named_by("--data_path"):
        parse_data_path(bad)


def test_a_path_that_exists_wins_over_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("snap:2", "plain", "both", "both:0.5"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rows.jsonl:3").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "one,two three.jsonl").touch()
    specs = parse_data_path(
        [
            "snap:2",
            "snap:2:0.5",
            f"{tmp_path}/snap:2:.3",
            "plain:2",
            "both:0.5",
            "both:0.25",
            "rows.jsonl:3",
            "one,two three.jsonl",
            "one,two three.jsonl:2",
        ]
    )
    assert [(spec.name, spec.weight) for spec in specs] == [
        ("snap:2", 1.0),
        ("snap:2", 0.5),
        (f"{tmp_path}/snap:2", 0.3),
        ("plain", 2.0),
        ("both:0.5", 1.0),
        ("both", 0.25),
        ("rows.jsonl:3", 1.0),
        ("one,two three.jsonl", 1.0),
        ("one,two three.jsonl", 2.0),
    ]


def test_the_flag_in_messages_is_the_one_that_was_used():
    with pytest.raises(UserError, match="--sft_only_data_path"), named_by("--sft_only_data_path"):
        parse_data_path(["a:0"])


@pytest.mark.parametrize("weight", [0.05, 0.3, 1.0, 1.7, 2.0])
def test_the_weight_is_the_mean_number_of_copies(weight):
    copies = [SourceSpec("a", weight).copies(f"question {number}") for number in range(4000)]
    assert abs(sum(copies) / len(copies) - weight) <= 5 * 0.5 / math.sqrt(len(copies))
    assert set(copies) <= {math.floor(weight), math.ceil(weight)}


@given(st.text(), st.floats(0.01, 5), st.floats(0.01, 5))
def test_a_greater_weight_keeps_all_that_a_smaller_one_keeps(turn, first, second):
    small, great = sorted((first, second))
    assert SourceSpec("a", small).copies(turn) <= SourceSpec("b", great).copies(turn)


@given(st.text(st.characters(codec="ascii")))
def test_near_identical_prompts_stay_or_go_together(turn):
    spec = SourceSpec("a", 0.5)
    assert spec.copies(turn) == spec.copies(f"  {turn.upper()}\n")
