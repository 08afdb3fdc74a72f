"""Rows as public data sets have them, beyond the plain layouts: what belongs to a question, several answers, tools,
reasoning, and what a row keeps from training."""

import json

import pytest

from common.data.adapters import choose_layout
from common.data.examples import LeftOut
from common.data.records import Comparison, Demonstration, Message, Prompt
from common.data.values import BadRow
from tests.layout_rows import chat, dialogue, record, records, sharegpt

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "q", "context": "c", "output": "a"}, dialogue("q\n\nc")),
        ({"instruction": "q", "context": "", "response": "a", "category": "x"}, dialogue("q")),
        ({"prompt": "q", "response": "a", "context": "c"}, dialogue("q\n\nc")),
        ({"prompt": chat("q1", "b", "q2"), "response": "a", "document": "d"}, dialogue("q1", "b", "q2\n\nd")),
        ({"question": "q", "passage": "p", "answer": "a"}, dialogue("q\n\np")),
        (
            {"instruction": "q2", "input": "i", "output": "a", "history": [["q1", "b"]], "system": "s"},
            dialogue("q1", "b", "q2\n\ni", system="s"),
        ),
        ({"prompt": "q", "completion": "a"}, dialogue("q")),
        ({"prompt": chat("q"), "completion": chat("", "a")[1:]}, dialogue("q")),
        ({"input": "q", "output": "a"}, dialogue("q")),
        ({"question": "q", "answer": "a"}, dialogue("q")),
        ({"query": "q", "response": "a"}, dialogue("q")),
        ({"Prompt": "q", " Response ": "a", "ID": 3}, dialogue("q")),
        ({"prompt": 1, "response": "a"}, dialogue("1")),
        ({"prompt": True, "response": "a"}, dialogue("true")),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "response": "a"}, dialogue("q")),
        ({"conversations": sharegpt("user", "q1", "bing", "b", "human", "q2", "Bard", "a")}, dialogue("q1", "b", "q2")),
        ({"conversations": sharegpt("developer", "s", "user", "q", "chatgpt", "a")}, dialogue("q", system="s")),
        ({"messages": [*chat("q1", "b", "q2", "a"), {"role": "user", "content": " "}]}, dialogue("q1", "b", "q2")),
        ({"system": "s", "conversations": sharegpt("human", "q", "model", "a")}, dialogue("q", system="s")),
    ],
)
def test_demonstrations_as_the_field_has_them(row, prompt):
    assert record(row, "demonstration") == Demonstration(prompt, "a")
    assert record(row, "prompt") == prompt


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, dialogue("q", system="s")),
        ({"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"}, dialogue("q\n\ni")),
        (
            {
                "conversations": sharegpt("human", "q"),
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            dialogue("q"),
        ),
        ({"prompt": chat("q"), "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]}, dialogue("q")),
        (
            {"chosen": chat("q", "good"), "rejected": chat("q", "bad"), "score_chosen": 5.0, "score_rejected": 1},
            dialogue("q"),
        ),
    ],
)
def test_comparisons_as_the_field_has_them(row, prompt):
    assert record(row, "comparison") == Comparison(prompt, "good", "bad")
    assert record(row, "demonstration") == Demonstration(prompt, "good")
    assert record(row, "prompt") == prompt


def test_several_answers_give_a_comparison_each():
    q = dialogue("q")
    several = {"prompt": "q", "chosen": "good", "rejected": ["bad", "worse", "bad"]}
    assert records(several, "comparison") == [Comparison(q, "good", "bad"), Comparison(q, "good", "worse")]
    ranked = {"instruction": "q", "output": ["a", "b", "c"]}
    expected = [Comparison(q, *pair) for pair in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert records(ranked, "comparison") == expected
    assert record(ranked, "demonstration") == Demonstration(q, "a")
    scored = {"prompt": "q", "responses": ["b", "c", "a", "b2"], "scores": [2, 1, 3, 2]}
    assert records(scored, "comparison") == [
        Comparison(q, *pair) for pair in (("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c"))
    ]
    assert records({"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1]}, "comparison") == [Comparison(q, "y", "x")]
    with pytest.raises(BadRow, match="'scores' has 1 numbers for 2 answers"):
        records({"prompt": "q", "responses": ["x", "y"], "scores": [1]}, "comparison")


@pytest.mark.parametrize(
    "equal",
    [
        {"score_chosen": 3, "score_rejected": 3.0},
        {"margin": 0},
        {"margin": "0.0"},
        {"chosen_rating": 4, "rejected_rating": 4},
    ],
)
def test_answers_as_good_as_each_other_are_no_comparison(equal):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", **equal}
    with pytest.raises(LeftOut, match="tie"):
        records(row, "comparison")
    assert record(row, "demonstration") == Demonstration(dialogue("q"), "a")


def test_a_label_says_which_answers_demonstrate_something():
    row = {"prompt": "q", "completion": "a", "label": True}
    assert record(row, "demonstration") == Demonstration(dialogue("q"), "a")
    with pytest.raises(LeftOut, match="labelled"):
        record({**row, "label": False}, "demonstration")
    assert record({**row, "label": False}, "prompt") == dialogue("q")
    with pytest.raises(BadRow, match="'label' is 'good'"):
        record({**row, "label": "good"}, "demonstration")


def test_an_answer_that_is_not_to_be_trained_gives_way_to_one_that_is():
    first, second = chat("q1", "a1"), chat("q2", "a2")
    for mark in ({"weight": 0}, {"train": False}):
        assert record({"messages": [*first, second[0], second[1] | mark]}, "demonstration") == Demonstration(
            dialogue("q1"), "a1"
        )
        with pytest.raises(LeftOut, match="no answer that is to be trained"):
            record({"messages": [first[0], first[1] | mark]}, "demonstration")
        assert record({"messages": [first[0], first[1] | mark]}, "prompt") == dialogue("q1")
    whole = {"messages": [first[0], first[1] | {"weight": 0}, second[0], second[1] | {"weight": 1}]}
    assert record(whole, "demonstration") == Demonstration(dialogue("q1", "a1", "q2"), "a2")


def test_a_dialogue_that_ends_with_a_question_asks_that():
    row = {"messages": chat("q1", "a1", "q2")}
    assert record(row, "prompt") == dialogue("q1", "a1", "q2")
    assert record(row, "demonstration") == Demonstration(dialogue("q1"), "a1")


@pytest.mark.parametrize("invisible", ["\u200b", " \u200d\ufeff\n", "\u2800", "\u3164", "\u00ad", "\u202e\u202c"])
def test_text_that_nobody_can_see_is_empty(invisible):
    with pytest.raises(BadRow, match="answer is empty"):
        record({"prompt": "q", "response": invisible}, "demonstration")
    with pytest.raises(BadRow, match="'prompt' is empty"):
        record({"prompt": invisible, "response": "a"}, "demonstration")
    assert record({"prompt": "q", "response": "a\u200bb \U0001f468\u200d\U0001f469"}, "demonstration").response == (
        "a\u200bb \U0001f468\u200d\U0001f469"
    )


@pytest.mark.parametrize(
    "answer, kept",
    [
        ("    return x\n", "    return x"),
        ("\n\n  if x:\n    y", "  if x:\n    y"),
        ("\treturn", "\treturn"),
        (" plain", "plain"),
        ("\n plain", "plain"),
        ("plain \n", "plain"),
    ],
)
def test_an_answer_keeps_its_indentation(answer, kept):
    assert record({"prompt": "q", "response": answer}, "demonstration").response == kept
    assert record({"messages": chat("q", answer)}, "demonstration").response == kept


def test_reasoning_kept_apart_belongs_to_the_answer():
    def row(thought, key="reasoning_content"):
        return chat("q") + [{"role": "assistant", "content": "42", key: thought}]

    for key in ("reasoning_content", "thinking"):
        pair = record({"chosen": row("good", key), "rejected": row("bad", key)}, "comparison")
        assert pair.prompt == dialogue("q")
        assert pair.chosen == (Message("assistant", "42", json.dumps({key: "good"})),)
        assert pair.rejected == (Message("assistant", "42", json.dumps({key: "bad"})),)
    assert record({"messages": row("why", "reasoning")}, "demonstration").response == (
        Message("assistant", "42", json.dumps({"reasoning_content": "why"})),
    )
    assert record({"messages": row(" ")}, "demonstration").response == "42"


def test_tool_calls_and_results_are_turns():
    call = Message("assistant", "", json.dumps({"tool_calls": CALL}, sort_keys=True))
    row = {
        "messages": [
            *chat("q"),
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": "sunny", "name": "weather"},
            chat("", "a")[1],
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    shown = record(row, "demonstration")
    assert shown.prompt.messages == (Message("user", "q"), call, Message("tool", "sunny", '{"name": "weather"}'))
    assert shown.response == "a" and json.loads(shown.prompt.tools) == row["tools"]
    spoken = record(
        {
            "conversations": sharegpt(
                "human", "q", "function_call", json.dumps(CALL[0]["function"]), "observation", "sunny", "gpt", "a"
            )
        },
        "demonstration",
    )
    assert spoken.prompt.messages == (Message("user", "q"), call, Message("tool", "sunny"))
    assert record({"messages": row["messages"][:2]}, "demonstration").response == (call,)
    with pytest.raises(BadRow, match="'conversations' has a call that is no JSON object"):
        record({"conversations": sharegpt("human", "q", "function_call", "weather!")}, "prompt")


def test_answers_that_differ_over_several_turns_are_compared_from_the_first_difference_on():
    row = {"chosen": chat("q1", "a1", "q2", "a2"), "rejected": chat("q1", "b1", "q3", "b2")}
    turns = [tuple(Message(**message) for message in row[side][1:]) for side in ("chosen", "rejected")]
    assert record(row, "comparison") == Comparison(dialogue("q1"), *turns)
    assert record(row, "demonstration") == Demonstration(dialogue("q1", "a1", "q2"), "a2")
    assert record(row, "prompt") == dialogue("q1")
    with pytest.raises(BadRow, match="differ before the last answer, in what is asked"):
        record({"chosen": chat("q1", "a", "q2", "a2"), "rejected": chat("q1", "a", "q3", "a2")}, "comparison")


def test_what_is_not_used_is_named():
    row = {"messages": [{"role": "user", "content": "q", "emotion": "sad"}, *chat("", "a")[1:]], "id": 1, "text": "x"}
    layout = choose_layout("somewhere/data.jsonl", row.keys(), "demonstration", "data.jsonl")
    assert sorted(layout.unused(row, "demonstration")) == ["id", "messages: emotion", "text"]
    row = {"messages": chat("q", "a", "and?")}
    assert list(layout.unused(row, "demonstration")) == ["messages: the question behind the last answer"]
    assert list(layout.unused(row, "prompt")) == []
    row = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "4"}}
    layout = choose_layout("somewhere/data.jsonl", row.keys(), "prompt", "data.jsonl")
    assert list(layout.unused(row, "prompt")) == ["reward_model"] and record(row, "prompt") == dialogue("q")


def test_tools_that_are_no_list_are_refused():
    with pytest.raises(BadRow, match="'tools' is no JSON"):
        record({"messages": chat("q", "a"), "tools": "a hammer"}, "prompt")
    assert isinstance(record({"messages": chat("q", "a"), "tools": []}, "prompt"), Prompt)


def U(text):
    return {"role": "user", "content": text}


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def S(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": [U("q"), A("a")]},
        {"prompt": [U("q")], "completion": [U("q"), A("a")]},
        {"prompt": "q", "response": "\n\nHuman: q\n\nAssistant: a"},
        {"prompt": "q", "completion": A("a")},
    ],
)
def test_an_answer_that_repeats_its_question_is_the_answer_alone(row):
    assert record(row, "demonstration") == Demonstration(dialogue("q"), "a")
    with pytest.raises(BadRow, match="holds another dialogue than the prompt's"):
        record({**row, "prompt": "r", "response": [U("q"), A("a")]}, "demonstration")


def test_an_answer_of_several_turns_keeps_them():
    turns = record({"prompt": "q", "response": [A("a1"), U("q2"), A("a2")]}, "demonstration")
    assert turns == Demonstration(dialogue("q", "a1", "q2"), "a2")


@pytest.mark.parametrize(
    "row, prompt",
    [
        (
            {"prompt": [S("s"), U("q")], "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
            dialogue("q", system="s"),
        ),
        (
            {"prompt": [U("q0"), A("a0"), U("q")], "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
            dialogue("q0", "a0", "q"),
        ),
        (
            {
                "prompt": [S("s"), U("q0")],
                "chosen": [U("q0"), A("a0"), U("q"), A("good")],
                "rejected": [U("q0"), A("a0"), U("q"), A("bad")],
            },
            dialogue("q0", "a0", "q", system="s"),
        ),
        (
            {
                "system": "s",
                "question": "q",
                "chosen": [S("s"), U("q"), A("good")],
                "rejected": [S("s"), U("q"), A("bad")],
            },
            dialogue("q", system="s"),
        ),
        ({"prompt": "q", "chosen": [U("q"), A("good")], "rejected": ["bad", "", None]}, dialogue("q")),
        ({"prompt": "q", "chosen": [[A("good")]], "rejected": [[U("q"), A("bad")], [U("q"), A("bad")]]}, dialogue("q")),
    ],
)
def test_a_pair_and_its_prompt_may_each_have_a_part_of_the_dialogue(row, prompt):
    assert record(row, "comparison") == Comparison(prompt, "good", "bad")


def test_text_that_is_already_in_the_prompt_is_not_added_again():
    assert record({"messages": [S("s"), U("q"), A("a")], "system": "s"}, "prompt") == dialogue("q", system="s")
    assert record({"question": "q", "answer": "a", "system": "s", "system_prompt": "s"}, "prompt") == dialogue(
        "q", system="s"
    )
    twice = {"prompt": "Read c.\n\nq", "response": "a", "context": "Read c."}
    assert record(twice, "prompt") == dialogue("Read c.\n\nq")
    short = {"instruction": "Add 10 to it", "input": "1", "output": "11"}
    assert record(short, "prompt") == dialogue("Add 10 to it\n\n1")


def test_an_instruction_wins_over_the_rendering_of_it_in_a_prompt():
    row = {"instruction": "q", "input": "i", "output": "a", "prompt": "Below is ... ### Instruction: q ### Output: a"}
    assert record(row, "demonstration") == Demonstration(dialogue("q\n\ni"), "a")


def test_a_label_column_applies_to_messages_too():
    for name in ("label", "kto_tag"):
        with pytest.raises(LeftOut, match="labelled"):
            record({"messages": [U("q"), A("a")], name: False}, "demonstration")
        assert record({"messages": [U("q"), A("a")], name: True}, "demonstration").response == "a"


@pytest.mark.parametrize(
    "mark", [{"train": "False"}, {"weight": "0.0"}, {"weight": -1}, {"loss": False}, {"loss_weight": 0}, {"train": 0}]
)
def test_every_way_to_keep_an_answer_from_training(mark):
    with pytest.raises(LeftOut, match="to be trained"):
        record({"messages": [U("q"), A("a", **mark)]}, "demonstration")
    assert record({"messages": [U("q"), A("a", weight=1.0, train="yes")]}, "demonstration").response == "a"


def test_consecutive_assistant_messages_are_joined():
    assert record({"messages": [U("q"), A("a1"), A("a2")]}, "demonstration") == Demonstration(dialogue("q"), "a1\n\na2")
    assert record({"messages": [U("q"), A("a1", name="Bot")]}, "demonstration").response == "a1"
    assert record({"messages": [U("q"), A("a1"), A("a2", weight=0)]}, "demonstration").response == "a1"


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "comparison"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 10**400]}, "comparison"),
        (
            {"prompt": [U([{"type": "text", "text": [{"type": "text", "text": "x"}]}])], "response": "a"},
            "demonstration",
        ),
        ({"conversations": sharegpt("human", "q", "function_call", '{"name": ' + "[" * 5000)}, "prompt"),
        ({"messages": [U("q"), A("a")], "tools": '[{"function": {"name": "\\ud800"}}]'}, "prompt"),
    ],
)
def test_hostile_values_are_bad_rows(row, kind):
    with pytest.raises(BadRow):
        record(row, kind)


def test_a_mixed_file_is_read_by_what_most_rows_have():
    columns = ("prompt", "response", "chosen", "rejected")
    rows = [{"prompt": "q", "response": "a"}] * 9 + [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    assert str(choose_layout("x.jsonl", columns, "demonstration", "x.jsonl", rows)) == "prompt/response"
    assert str(choose_layout("x.jsonl", columns, "comparison", "x.jsonl", rows)) == "prompt/chosen/rejected"


def test_unused_keys_are_named_wherever_messages_lie():
    row = {"prompt": "q", "chosen": {**A("a"), "mood": 1}, "rejected": [[U("q") | {"name": "Ann"}, A("b", stop=2)]]}
    layout = choose_layout("x.jsonl", row.keys(), "comparison", "x.jsonl", [row])
    assert sorted(layout.unused(row, "comparison")) == ["chosen: mood", "rejected: name", "rejected: stop"]
