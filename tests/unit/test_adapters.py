"""Rows of every known layout become the records they stand for; others are refused with a reason."""

import pytest

from common.data.adapters import NAMED, ColumnMap, choose_layout, named_layout
from common.data.examples import LeftOut, user_turns_in
from common.data.options import naming_flags
from common.data.records import Comparison, Demonstration, PlainText, user_turns
from common.data.values import BadRow
from common.errors import UserError
from tests.layout_rows import chat, dialogue, record, records, sharegpt

TRANSCRIPT = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
TWO_TURNS = dialogue("q1", "a1", "q2")

COMPARISONS = {
    "plain": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, dialogue("q")),
    "system": ({"prompt": "q", "system_prompt": "s", "chosen": "good", "rejected": "bad"}, dialogue("q", system="s")),
    "transcript prompt": ({"prompt": TRANSCRIPT, "chosen": " good", "rejected": " bad\n"}, TWO_TURNS),
    "cue in the answer": (
        {
            "prompt": "Human: q1\n\nAssistant: a1\n\nHuman: q2\n\n",
            "chosen": "Assistant: good",
            "rejected": "Assistant: bad",
        },
        TWO_TURNS,
    ),
    "cues within a line": (
        {"prompt": "Human: q1 Assistant: a1 Human: q2 ", "chosen": "Assistant: good", "rejected": "Assistant: bad"},
        TWO_TURNS,
    ),
    "transcripts": ({"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"}, TWO_TURNS),
    "transcripts beside a prompt": (
        {"prompt": TRANSCRIPT, "chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"},
        TWO_TURNS,
    ),
    "lists": ({"chosen": chat("q1", "a1", "q2", "good"), "rejected": chat("q1", "a1", "q2", "bad")}, TWO_TURNS),
    "lists beside a prompt": (
        {"prompt": "q1", "chosen": chat("q1", "good"), "rejected": chat("q1", "bad"), "messages": chat("q1", "good")},
        dialogue("q1"),
    ),
    "answers as lists": (
        {"prompt": chat("q1", "a1", "q2"), "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
        TWO_TURNS,
    ),
}


@pytest.mark.parametrize("row, prompt", COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons_serve_as_all_three(row, prompt):
    assert record(row, "comparison") == Comparison(prompt, "good", "bad")
    assert record(row, "demonstration") == Demonstration(prompt, "good")
    assert record(row, "prompt") == prompt


DEMONSTRATIONS = {
    "prompt/response": ({"prompt": "q", "response": "a"}, dialogue("q")),
    "transcript": ({"prompt": TRANSCRIPT, "response": " a"}, TWO_TURNS),
    "alpaca": ({"instruction": "q", "input": "", "output": "a", "text": "all"}, dialogue("q")),
    "alpaca with input": ({"instruction": "q", "input": "i", "output": "a"}, dialogue("q\n\ni")),
    "alpaca without the column": ({"instruction": "q", "output": "a"}, dialogue("q")),
    "question": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, dialogue("q", system="s")),
    "question, no system": ({"system_prompt": "", "question": "q", "response": "a"}, dialogue("q")),
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, *chat("q1", "b", "q2", "a")]},
        dialogue("q1", "b", "q2", system="s"),
    ),
    "ShareGPT": (
        {"id": "1", "conversations": sharegpt("system", "s", "human", "q1", "gpt", "b", "human", "q2", "gpt", "a")},
        dialogue("q1", "b", "q2", system="s"),
    ),
    "ShareGPT, other names": ({"conversations": sharegpt("user", "q", "assistant", "a")}, dialogue("q")),
    "messages by another name": ({"conversations": chat("q", "a")}, dialogue("q")),
}


@pytest.mark.parametrize("row, prompt", DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations_serve_as_prompts(row, prompt):
    assert record(row, "demonstration") == Demonstration(prompt, "a")
    assert record(row, "prompt") == prompt
    with pytest.raises(UserError, match="give demonstrations and prompts, not comparisons, which need"):
        record(row, "comparison")


@pytest.mark.parametrize(
    "row", [row for row, _ in (*COMPARISONS.values(), *DEMONSTRATIONS.values())], ids=[*COMPARISONS, *DEMONSTRATIONS]
)
def test_what_a_row_asks_is_known_without_its_answers(row):
    """So that a test prompt is recognised by what it asks, even in a row that can be used for nothing else."""
    layout = choose_layout("somewhere/data.jsonl", row.keys(), "prompt", "data.jsonl")
    expected = {user_turns(record(row, "prompt"))}
    assert user_turns_in(layout, row) == expected
    for column in {"chosen", "rejected", "response", "output"} & row.keys():
        spoilt = {**row, column: row[column] + "\0" if isinstance(row[column], str) else [*row[column], 7]}
        assert user_turns_in(layout, spoilt) == expected


def test_a_response_beside_a_comparison_is_the_demonstration():
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "response": "shown"}
    assert record(row, "demonstration").response == "shown"
    assert record(row | {"response": None}, "demonstration").response == "good"


def test_prompts_and_texts():
    assert record({"prompt": "q"}, "prompt") == dialogue("q")
    assert record({"prompt": chat("q1", "a1", "q2")}, "prompt") == TWO_TURNS
    assert record({"messages": chat("q")}, "prompt") == dialogue("q")
    assert record({"text": " once "}, "text") == PlainText("once")
    assert record({"prompt": "q", "text": "once"}, "text") == PlainText("once")
    with pytest.raises(UserError, match="not demonstrations"):
        record({"text": "once"}, "demonstration")


def test_a_blank_text_is_no_record():
    with pytest.raises(LeftOut, match="blank"):
        records({"text": " \n"}, "text")


def test_words_that_look_like_cues_stay_in_the_text():
    quoting = "\n\nHuman: what does Assistant: mean?\nHuman: hm\n\nAssistant:"
    assert record({"prompt": quoting}, "prompt") == dialogue("what does Assistant: mean?\nHuman: hm")
    plain = "Which: Human: or Assistant: ?"
    assert record({"prompt": plain}, "prompt") == dialogue(plain)


def test_turns_of_one_speaker_in_a_row_are_one():
    text = "\n\nHuman: q1\n\nHuman: q2\n\nAssistant:\n\nHuman: q3\n\nAssistant: a\n\nHuman: q4"
    assert record({"prompt": text}, "prompt") == dialogue("q1\n\nq2\n\nq3", "a", "q4")


BAD = {
    "same answers": ({"prompt": "q", "chosen": "a", "rejected": " a "}, "comparison", "same"),
    "empty chosen": ({"prompt": "q", "chosen": " ", "rejected": "a"}, "comparison", "chosen answer is empty"),
    "no rejected": ({"prompt": "q", "chosen": "a", "rejected": None}, "comparison", "'rejected' is missing"),
    "empty prompt": ({"prompt": "\n", "chosen": "a", "rejected": "b"}, "comparison", "'prompt' is empty"),
    "object": ({"prompt": "q", "response": {"a": 3}}, "demonstration", "'response'.*'role'"),
    "nested list": ({"prompt": "q", "output": "a", "input": [["x"]]}, "demonstration", "'input' is not text but list"),
    "NUL": ({"prompt": "q\0", "response": "a"}, "demonstration", "NUL"),
    "surrogate": ({"prompt": "q", "response": "\ud800"}, "demonstration", "'response' is invalid UTF-8"),
    "different dialogues": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"},
        "comparison",
        "differ before the last answer",
    ),
    "empty last answer": (
        {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + " b"},
        "comparison",
        "chosen answer is empty",
    ),
    "user at the end": (
        {"chosen": TRANSCRIPT + " a\n\nHuman: bye", "rejected": TRANSCRIPT + " b"},
        "comparison",
        "does not end with an answer",
    ),
    "no transcript": ({"chosen": "a", "rejected": "b"}, "comparison", "begins with 'Human:'"),
    "prompt with an answer": ({"prompt": TRANSCRIPT + " a2"}, "prompt", "no user's turn"),
    "unknown role": ({"messages": [{"role": "critic", "content": "x"}]}, "prompt", "role 'critic'"),
    "no role": ({"messages": ["x"]}, "prompt", "'role'"),
    "unknown speaker": ({"conversations": sharegpt("critic", "x")}, "prompt", "'conversations'.*'critic'"),
    "no speaker": ({"conversations": [{"value": "x"}]}, "prompt", "'from'"),
    "conversations without an answer": ({"conversations": sharegpt("human", "q")}, "demonstration", "answer is empty"),
    "no list of turns": ({"conversations": "x"}, "prompt", "'conversations' is not a list"),
    "no list": ({"messages": "x"}, "prompt", "not a list"),
    "late system": (
        {"messages": [*chat("q", "a"), {"role": "system", "content": "s"}, *chat("q", "a")]},
        "demonstration",
        "system",
    ),
    "no answer": ({"messages": chat("q")}, "demonstration", "answer is empty"),
    "no text": ({"text": None}, "text", "'text' is missing"),
}


@pytest.mark.parametrize("row, kind, why", BAD.values(), ids=BAD)
def test_rows_that_cannot_be_used_say_why(row, kind, why):
    with pytest.raises(BadRow, match=why):
        record(row, kind)


def test_an_unknown_layout_lists_what_is_there_and_what_is_understood():
    with pytest.raises(UserError) as error, naming_flags():
        record({"frage": "q", "antwort": "a"}, "demonstration")
    for part in (
        "data.jsonl",
        "antwort, frage",
        "prompt/chosen/rejected",
        "instruction/output",
        "messages",
        "text",
        "--columns",
    ):
        assert part in str(error.value)


def test_the_column_map():
    row = {"question": "q", "good": "good", "bad": "bad", "prompt": "an id"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert record(row, "comparison", columns=names) == Comparison(dialogue("q"), "good", "bad")
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    row = {"prompt": "q", "chosen": "bad", "rejected": "good"}
    assert record(row, "comparison", columns=swapped) == Comparison(dialogue("q"), "good", "bad")


def test_a_wrong_column_map_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="--columns 'promt'.*did you mean prompt"), naming_flags():
        ColumnMap({"promt": "question"})
    with (
        pytest.raises(UserError, match="--columns prompt=qestion: data.jsonl has no column 'qestion'.*mean question"),
        naming_flags(),
    ):
        record({"question": "q"}, "prompt", columns={"prompt": "qestion"})


SHP = {"history": "post", "human_ref_A": "A", "human_ref_B": "B", "score_A": 9}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "q"},
    "answer_0": "zero [1, 2].",
    "answer_1": "one[3]",
    "tokens_0": {"prefix": [1], "completion": [2]},
}
ORCA = {"instruction": "s", "conversation": [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}]}
PLAIN = COMPARISONS["plain"][0]
HH = {"prompt": TRANSCRIPT, "response": " good", "chosen": " good", "rejected": " bad"}

SETS = {
    "Dahoas/rm-static": (HH, Comparison(TWO_TURNS, "good", "bad")),
    "Dahoas/full-hh-rlhf": (HH, Comparison(TWO_TURNS, "good", "bad")),
    "Dahoas/synthetic-instruct-gptj-pairwise": (PLAIN, Comparison(dialogue("q"), "good", "bad")),
    "yitingxie/rlhf-reward-datasets": (COMPARISONS["cue in the answer"][0], Comparison(TWO_TURNS, "good", "bad")),
    "Anthropic/hh-rlhf": (COMPARISONS["transcripts"][0], Comparison(TWO_TURNS, "good", "bad")),
    "Open-Orca/OpenOrca": (DEMONSTRATIONS["question"][0], Demonstration(dialogue("q", system="s"), "a")),
    "tatsu-lab/alpaca": (DEMONSTRATIONS["alpaca"][0], Demonstration(dialogue("q"), "a")),
    "yahma/alpaca-cleaned": (DEMONSTRATIONS["alpaca with input"][0], Demonstration(dialogue("q\n\ni"), "a")),
    "shahules786/orca-chat": (ORCA, Demonstration(dialogue("q1", "a1", "q2", system="s"), "a2")),
    "stanfordnlp/SHP": (SHP | {"labels": 0}, Comparison(dialogue("post"), "B", "A")),
    "openai/webgpt_comparisons": (
        WEBGPT | {"score_0": 0.5, "score_1": -0.5},
        Comparison(dialogue("q"), "zero.", "one"),
    ),
}


def test_every_set_known_by_name_is_tried_here():
    assert {name.lower() for name in SETS} == set(NAMED)


@pytest.mark.parametrize("place", ["{0}", "./{0}", "/copy/{0}/", "/copy/{0}/data/train-0.parquet", "/{1}"])
@pytest.mark.parametrize("name", SETS)
def test_sets_known_by_name_wherever_they_lie(name, place):
    row, expected = SETS[name]
    where = place.format(name, name.split("/")[1])
    assert named_layout(where) is NAMED[name.lower()]
    assert record(row, type(expected).__name__.lower(), where) == expected


def test_a_stand_in_with_other_columns_is_read_by_its_columns():
    row = {"prompt": "q", "response": "a"}
    assert record(row, "demonstration", "./stanfordnlp/SHP").response == "a"


def test_the_preferred_answer_of_shp_follows_the_label():
    first = record(SHP | {"labels": 1}, "comparison", "stanfordnlp/SHP")
    assert first == Comparison(dialogue("post"), "A", "B")
    with pytest.raises(BadRow, match="labels"):
        record(SHP | {"labels": 2}, "comparison", "stanfordnlp/SHP")


def test_a_tie_is_no_comparison_but_a_demonstration_and_a_prompt():
    tie = WEBGPT | {"score_0": 0.0, "score_1": 0.0}
    with pytest.raises(LeftOut, match="tie"):
        record(tie, "comparison", "openai/webgpt_comparisons")
    assert record(tie, "demonstration", "openai/webgpt_comparisons").response == "zero."
    assert record(tie, "prompt", "openai/webgpt_comparisons") == dialogue("q")
