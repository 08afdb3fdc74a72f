"""From sources to records: counted, weighted, and with no source's test prompt left for training."""

import json
from collections import Counter
from pathlib import Path

import pytest

from common.data import reading
from common.data.blend import parse_data_path
from common.data.options import naming_flags
from common.data.preparation_report import PreparationReport
from common.data.reading import Counts, ReadReport, read_records
from common.data.records import Comparison, user_turns
from common.data.split import assignment
from common.errors import UserError


def lines(path: Path, *rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(data_path, kind="prompt", **choices):
    report = ReadReport()
    return list(read_records(parse_data_path(data_path), kind, report=report, **choices)), report


def prompts(found):
    return [(item.split, user_turns(item.record)[0]) for item in found]


def test_real_pairs(hh_data):
    found, report = read([str(hh_data)], "comparison")
    counts = report.sources[str(hh_data)]
    assert counts.total == 1500 and counts.usable == len(found) and 1 <= counts.bad <= 10
    assert counts.usable + counts.bad == counts.total
    report.check(0.01)
    for item in found:
        assert isinstance(item.record, Comparison)
        roles = [message.role for message in item.record.prompt.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert item.record.chosen != item.record.rejected
        assert not any(
            cue in answer
            for cue in ("\n\nHuman:", "\n\nAssistant:")
            for answer in (item.record.chosen, item.record.rejected)
        )
    assert len({len(item.record.prompt.messages) for item in found}) > 1  # dialogues of several lengths
    assert all(Path(where.rsplit(":", 1)[0]).is_file() for where, _ in report.first_bad)


def test_real_pairs_in_three_phases(hh_data):
    """No first question is ever in two phases or on both sides, however the file is read."""
    places = {}
    for kind in ("comparison", "demonstration", "prompt"):
        for item in read([str(hh_data)], kind)[0]:
            turn = user_turns(item.record)[0]
            places.setdefault(" ".join(turn.lower().split()), set()).add(assignment(turn, "2,4,4", 0.1))
    assert all(len(found) == 1 for found in places.values())
    phases = Counter(place.phase for found in places.values() for place in found)
    assert all(abs(phases[phase] / len(places) - share) < 0.06 for phase, share in enumerate((0.2, 0.4, 0.4)))


@pytest.mark.parametrize("split_by", ["opening", "auto", "prompt"])
def test_a_row_has_one_key_whatever_kind_is_read_of_it(hh_data, tmp_path, split_by):
    """A row may be bad for one kind alone, and is counted for all."""
    greeted = lines(
        tmp_path / "greeted.jsonl",
        *(
            {
                "chosen": f"Human: Hello\n\nAssistant: Hi!\n\nHuman: {i}?\n\nAssistant: Yes.",
                "rejected": f"Human: Hello\n\nAssistant: Hi!\n\nHuman: {i}?\n\nAssistant: {'No.' if i % 3 else 'Yes.'}",
            }
            for i in range(8)
        ),
    )
    by_kind = [
        {
            item.location: (item.split_key, item.dialogue)
            for item in read([str(hh_data), greeted], kind, split_by=split_by)[0]
        }
        for kind in ("comparison", "demonstration", "prompt")
    ]
    assert len(by_kind[0]) < len(by_kind[2]) and all(keys.items() <= by_kind[2].items() for keys in by_kind)
    keys = {key for where, (key, _) in by_kind[0].items() if where.startswith(greeted)}
    assert len(keys) == (1 if split_by == "opening" else 5)


def test_counting_openings_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    path = lines(tmp_path / "data.jsonl", *({"prompt": f"q {number}"} for number in range(2500)))
    monkeypatch.setattr(reading, "_SAID_EVERY", -1)
    read([path], split_by="auto")
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: {number} rows looked through for openings that many dialogues share" for number in ("1,000", "2,000")
    ]


def test_bad_rows_are_counted_shown_and_skipped(tmp_path):
    path = lines(
        tmp_path / "data.jsonl",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "{oops",
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a"},
        "",
        {"prompt": "r", "chosen": "a", "rejected": "b"},
    )
    found, report = read([path], "comparison")
    assert [item.location for item in found] == [f"{path}:1", f"{path}:6"]
    first_bad = [
        (f"{path}:2", "broken JSON"),
        (f"{path}:3", "chosen and rejected are the same"),
        (f"{path}:4", "'rejected' is missing"),
    ]
    assert report.sources[path] == Counts(total=5, usable=2, bad=3, first_bad=first_bad)
    assert report.first_bad == first_bad
    report.check(0.6)
    with pytest.raises(UserError, match=f"{path}: 3 of 5 rows .* 0.5.*:2: broken JSON.*--max_bad_rows"), naming_flags():
        report.check(0.5)


def test_bad_rows_are_told_with_their_own_source_alone(tmp_path):
    """One source's name may begin with another's."""
    short, long = (lines(tmp_path / name / "x.jsonl", {"prompt": "q"}, "{oops") for name in ("d", "d2"))
    names = [str(Path(path).parent) for path in (long, short)]
    report = read(names)[1]
    assert [report.sources[name].first_bad for name in names] == [
        [(f"{path}:2", "broken JSON")] for path in (long, short)
    ]
    report.sources[names[0]].usable = report.sources[names[0]].total = 100
    with pytest.raises(UserError) as error:
        report.check(0.1)
    assert short in str(error.value) and long not in str(error.value)
    written = PreparationReport(report)
    assert PreparationReport.from_json(written.to_json()) == written
    both = written.joined(PreparationReport(read([names[1]])[1]))
    assert both.read.sources[names[1]] == Counts(4, 2, 2, [(f"{short}:2", "broken JSON")] * 2)


def test_rows_that_are_all_left_out_say_why(tmp_path):
    path = lines(tmp_path / "data.jsonl", *[{"prompt": f"q {n}", "completion": "a", "label": False} for n in range(3)])
    with pytest.raises(UserError, match="none of its 3 rows can be used; 3 left out .answer labelled as a bad one"):
        read([path], "demonstration")[1].check(0.02)


def test_blank_texts_are_left_out_without_fault(tmp_path):
    path = lines(tmp_path / "data.jsonl", *[{"text": ""}, {"text": " \n"}] * 20, {"text": " = Title = "}, "{oops")
    found, report = read([path], "text")
    assert [item.record.text for item in found] == ["= Title ="]
    assert report.sources[path] == Counts(
        total=42, usable=1, bad=1, first_bad=[(f"{path}:42", "broken JSON")], left_out={"blank": 40}
    )
    assert f"{path}: 42 rows read, 1 unusable, 40 left out (blank)" in PreparationReport(report).lines()


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    pair = {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0}
    path = lines(tmp_path / "data.jsonl", pair, {**pair, "score_0": 1, "score_1": -1}, pair)
    found, report = read([path], "comparison")
    assert len(found) == 1
    assert report.sources[path] == Counts(total=3, usable=1, left_out={"a tie": 2})
    written = PreparationReport.from_json(PreparationReport(report).to_json())
    texts = lines(tmp_path / "texts.jsonl", {"text": ""}, {"text": "t"})
    both = written.joined(PreparationReport(read([path], "comparison")[1])).joined(
        PreparationReport(read([texts], "text")[1])
    )
    assert both.read.sources == {path: Counts(6, 2, left_out={"a tie": 4}), texts: Counts(2, 1, left_out={"blank": 1})}
    assert f"{path}: 6 rows read, 0 unusable, 4 left out (a tie)" in both.lines()


def test_a_source_without_a_usable_row_is_an_error_even_in_a_blend(tmp_path):
    good = lines(tmp_path / "good.jsonl", {"prompt": "q"})
    for empty in (lines(tmp_path / "empty.jsonl"), lines(tmp_path / "broken.jsonl", *["{oops"] * 50)):
        report = read([good, empty])[1]
        with pytest.raises(UserError, match=f"{empty}: none of its"):
            report.check(1.0)


def test_bad_rows_at_the_start_do_not_hide_the_layout(tmp_path):
    path = lines(tmp_path / "data.jsonl", *["{oops"] * 50, {}, {"id": 1, "prompt": "q"}, {"prompt": "r"})
    found, report = read([path])
    assert prompts(found) == [("train", "q"), ("train", "r")]
    assert report.sources[path].bad == 51


def test_a_test_prompt_is_never_for_training_in_whichever_source_it_lies(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    lines(one / "train.jsonl", {"prompt": "a"}, {"prompt": "B  b"})
    lines(one / "test.jsonl", {"prompt": "b B"})
    lines(
        two / "train.jsonl",
        {"prompt": "b b"},
        {"prompt": "c"},
        {"prompt": "Human: b b\n\nAssistant: x\n\nHuman: and then?"},
    )
    for order in ([one, two], [two, one]):
        found = prompts(read([str(path) for path in order])[0])
        assert sorted(text for split, text in found if split == "train") == ["a", "c"]
        assert len(found) == 6


@pytest.mark.parametrize("kind", ["comparison", "demonstration", "prompt"])
@pytest.mark.parametrize(
    "faulty",
    [
        {"prompt": "Q  0?", "chosen": "a", "rejected": "a"},
        {"prompt": "Q 0?", "chosen": "", "rejected": "b"},
        {"prompt": "Q 0?", "chosen": "a"},
        {"prompt": "Q 0?", "chosen": "a\0", "rejected": 5},
        {"prompt": "Q 0?", "chosen": "a", "rejected": "\udc80"},
        {"prompt": [{"role": "user", "content": "Q 0?"}, {"role": "assistant"}], "chosen": "a", "rejected": "b"},
        {"prompt": "Human: Q 0?\n\nAssistant: a", "chosen": "a", "rejected": "b"},
        {"chosen": "Human: Q 0?\n\nAssistant: a", "rejected": "Human: Q 0?\n\nAssistant: a"},
        {"chosen": "Human: Q 0?\n\nAssistant: a\0", "rejected": None},
        {"chosen": None, "rejected": [{"role": "user", "content": "Q 0?"}]},
        {"history": "Q 0?", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
        {"question": {"full_text": "Q 0?"}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0},
        {"question": {"full_text": "Q 0?"}, "answer_0": "a", "answer_1": "b", "score_0": "x", "score_1": 0},
    ],
)
def test_the_prompt_of_a_faulty_test_row_is_never_for_training(tmp_path, faulty, kind):
    """A row may be bad, or a tie, for one kind alone: what it asks is test data for all."""
    good = {"prompt": "q 1", "chosen": "a", "rejected": "b"}
    lines(tmp_path / "train.jsonl", good, {**good, "prompt": "q 0?"})
    lines(tmp_path / "test.jsonl", *[{**good, "prompt": "q 2"}] * ("prompt" in faulty), faulty)
    for max_rows in (None, 1):
        found = prompts(read([str(tmp_path)], kind, max_rows=max_rows)[0])
        assert ("train", "q 1") in found and ("train", "q 0?") not in found


@pytest.mark.parametrize("kind", ["demonstration", "prompt"])
@pytest.mark.parametrize(
    "faulty",
    [
        {"prompt": "Q 0?", "response": ""},
        {"instruction": "Q", "input": "0?", "output": 7},
        {"question": "Q 0?", "response": None},
        {"messages": [{"role": "user", "content": "q 0?"}, {"role": "assistant", "content": 7}]},
        {"conversations": [{"from": "human", "value": "q 0?"}, {"from": "robot", "value": "a"}]},
        {"instruction": "Be kind.", "conversation": [{"input": "q 0?", "output": None}, "a"]},
    ],
)
def test_the_prompt_of_a_faulty_demonstration_is_never_for_training(tmp_path, faulty, kind):
    lines(tmp_path / "train.jsonl", {"prompt": "q 1", "response": "a"}, {"prompt": "q 0?", "response": "b"})
    lines(tmp_path / "test.jsonl", faulty)
    assert ("train", "q 0?") not in prompts(read([str(tmp_path)], kind)[0])


def test_a_byte_that_is_no_utf_8_spoils_its_own_column_alone(tmp_path):
    lines(
        tmp_path / "train.jsonl",
        {"prompt": "q 1", "chosen": "a", "rejected": "b"},
        {"prompt": "q 0", "chosen": "a", "rejected": "b"},
    )
    (tmp_path / "test.jsonl").write_bytes(b'{"prompt": "q 0", "chosen": "a", "rejected": "\xff"}\n')
    found, report = read([str(tmp_path)], "comparison")
    assert prompts(found) == [("train", "q 1"), ("test", "q 0")]
    assert report.first_bad == [(f"{tmp_path}/test.jsonl:1", "'rejected' is invalid UTF-8")]


def test_max_rows_is_per_source_and_split(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("train-1", "train-2", "test"):
        lines(one / f"{name}.jsonl", *({"prompt": f"{name} {number}"} for number in range(5)))
    lines(two / "data.jsonl", *({"prompt": f"two {number}"} for number in range(5)))
    found = Counter(split for split, _ in prompts(read([str(one), str(two)], max_rows=7)[0]))
    assert found == {"test": 5, "train": 7 + 5}


def test_max_rows_makes_no_test_prompt_a_training_prompt(tmp_path):
    lines(tmp_path / "train.jsonl", {"prompt": "q 3"}, {"prompt": "r"}, {"prompt": "q 0"})
    lines(tmp_path / "test-1.jsonl", {"prompt": "q 0"}, {"prompt": "q 1"}, "{oops")
    lines(tmp_path / "test-2.jsonl", {"prompt": "q 2"}, "{oops", {"prompt": "Q  3"})
    found, report = read([str(tmp_path)], max_rows=2)
    assert prompts(found) == [("test", "q 0"), ("test", "q 1"), ("test", "q 3"), ("train", "r")]
    assert report.sources[str(tmp_path)] == Counts(total=4, usable=4)


def test_weights_repeat_and_thin_out_a_source(tmp_path):
    path = lines(tmp_path / "data.jsonl", *({"prompt": f"q {number}"} for number in range(400)))
    whole = {text for _, text in prompts(read([path])[0])}
    third = [text for _, text in prompts(read([f"{path}:0.33"])[0])]
    assert 90 < len(third) < 175 and set(third) < whole
    twice = read([f"{path}:2.33"])[0]
    assert Counter(item.copy for item in twice) == {0: 400, 1: 400, 2: len(third)}


def test_files_of_one_directory_may_differ_in_layout(tmp_path):
    lines(tmp_path / "a.jsonl", {"prompt": "q", "response": "a"})
    lines(tmp_path / "b.jsonl", {"instruction": "r", "output": "b"})
    assert [item.record.response for item in read([str(tmp_path)], "demonstration")[0]] == ["a", "b"]
    with pytest.raises(UserError, match="a.jsonl.*not comparisons"):
        read([str(tmp_path)], "comparison")


def test_a_column_map_is_for_the_sources_that_have_its_columns(tmp_path):
    own = lines(tmp_path / "own" / "data.jsonl", "{oops", {"question": "q", "good": "a", "prompt": "an id"})
    other = lines(tmp_path / "other.jsonl", {"prompt": "r", "response": "b"})
    names = {"prompt": "question", "response": "good"}
    for order in ([own, other], [other, own], [str(tmp_path)]):
        found, _ = read(order, "demonstration", columns=names)
        assert sorted((user_turns(item.record)[0], item.record.response) for item in found) == [("q", "a"), ("r", "b")]
    for order in ([own, other], [other, own], [str(tmp_path)]):
        with (
            pytest.raises(UserError, match=f"--columns prompt=qestion: {own} has no column 'qestion'.*mean q"),
            naming_flags(),
        ):
            read(order, "demonstration", columns={"prompt": "qestion", "response": "good"})


def test_a_column_map_for_another_kind_is_no_matter(tmp_path):
    """The prompts' column map does not hinder the plain text, which lies elsewhere; nor the other way round."""
    path = lines(tmp_path / "data.jsonl", {"text": "once"})
    assert len(read([path], "text", columns={"prompt": "question"})[0]) == 1
    path = lines(tmp_path / "own.jsonl", {"question": "q"})
    assert len(read([path], "prompt", columns={"prompt": "question", "text": "body"})[0]) == 1


def test_dialogues_that_begin_alike_stay_together(tmp_path):
    """Two user turns in a row are joined for the template; the dialogue still begins with the first."""
    lines(
        tmp_path / "train.jsonl",
        {"prompt": "A"},
        {"prompt": "\n\nHuman: A\n\nAssistant:\n\nHuman: B\n\nAssistant:"},
        {"prompt": [{"role": "user", "content": text} for text in ("", "a", "B")]},
    )
    found = read([str(tmp_path)])[0]
    assert [item.record.messages[-1].content for item in found] == ["A", "A\n\nB", "a\n\nB"]
    assert [user_turns(item.record) for item in found] == [("A",), ("A", "B"), ("a", "B")]
    assert len({item.dialogue for item in found}) == 1
    lines(tmp_path / "test.jsonl", {"prompt": "A"})
    assert {split for split, _ in prompts(read([str(tmp_path)])[0])} == {"test"}


def test_files_left_out_are_told(tmp_path):
    lines(tmp_path / "train.jsonl", {"prompt": "q"})
    lines(tmp_path / "extra.jsonl", {"prompt": "r"})
    found, report = read([str(tmp_path)])
    assert prompts(found) == [("train", "q")]
    assert report.notes == [f"{tmp_path}: left out, belonging to no split: extra.jsonl"]


def test_the_built_in_task_gives_every_kind_but_text():
    for kind in ("prompt", "demonstration", "comparison"):
        found, report = read(["builtin:courtesy"], kind, max_rows=50)
        assert len(found) == 50
        report.check(0.0)
    with pytest.raises(UserError, match="builtin:courtesy.*not plain texts"):
        read(["builtin:courtesy"], "text")


def test_reading_streams(tmp_path):
    """The first record of an endless supply comes at once: nothing is gathered first."""
    path = lines(tmp_path / "data.jsonl", *({"prompt": f"q {number}"} for number in range(20_000)))
    report = ReadReport()
    next(read_records(parse_data_path([path]), "prompt", report=report))
    assert report.sources[path].total == 1
