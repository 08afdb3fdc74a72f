"""What keeps rows together in the split of prepared data: the same in every step, whatever kind it reads."""

import random

import pytest

from common.data.options import naming_flags
from common.data.prepare import prepare, prepare_many
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe

PHASES = (0, 1, 2)
KINDS = ("demonstration", "comparison", "prompt")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def messages(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def greeted(count: int, *, start: int = 0, more: tuple[str, ...] = (), **columns) -> list[dict]:
    """Pairs whose dialogues all begin with the same turn."""
    return [
        {
            "prompt": messages("Hello", "Hello! What is it?", f"What is {i} plus {i}?", *more),
            "chosen": f"The sum is {2 * i}.",
            "rejected": "No idea.",
            **columns,
        }
        for i in range(start, start + count)
    ]


def asked(codec, dataset) -> list[str]:
    """Every row's prompt from its second question on."""
    texts = codec.tokenizer.batch_decode(dataset["prompt_ids"][:], skip_special_tokens=True)
    return [text.split("Human:", 2)[-1].removesuffix("Assistant:").strip() for text in texts]


def test_dialogues_with_one_opening_are_divided_among_steps_and_sides(tmp_path, codec):
    rows = greeted(100)
    path = write(tmp_path / "d.jsonl", rows)
    data = [
        prepare(request(tmp_path, path, phase=phase, kind=kind), codec) for phase, kind in zip(PHASES, KINDS)
    ]  # as the steps read it
    held_out = set(asked(codec, data[0].eval))
    assert 8 <= len(held_out) <= 35 and all(set(asked(codec, part.eval)) == held_out for part in data)
    trained = [asked(codec, part.train) for part in data]
    assert all(len(part) > 8 for part in trained)
    together = [text for part in trained for text in part] + sorted(held_out)
    assert len(together) == 100 == len(set(together))
    (said,) = [line for line in data[0].report.lines() if "Hello" in line]
    assert said == f"100 rows of {path} begin with 'Hello': split by the user's first 2 turns"


def test_every_kind_counts_the_same_rows_though_it_reads_others(tmp_path, codec):
    """Of parts for several uses; in one of them alone the opening would be a rare one."""

    def some(count, kind):
        return [
            {
                "messages" if kind == "sft" else "chosen": turns,
                **({"rejected": [*turns[:-1], {"role": "assistant", "content": "bad"}]} if kind == "prefs" else {}),
            }
            for number in range(count)
            for turns in [
                [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hi"},
                    {"role": "user", "content": f"{kind} {number}?"},
                    {"role": "assistant", "content": "Yes."},
                ]
            ]
        ]

    write(tmp_path / "set" / "train_sft.jsonl", some(4, "sft"))
    write(tmp_path / "set" / "train_prefs.jsonl", some(30, "prefs"))
    reports = [
        prepare(request(tmp_path, str(tmp_path / "set"), phase=None, kind=kind, eval_fraction=0.5), codec).report
        for kind in ("demonstration", "comparison")
    ]
    first, second = (list(report.read.shared.values()) for report in reports)
    assert first == second and len(first[0]) == 1


def test_the_split_does_not_depend_on_the_order_of_rows_or_files(tmp_path, codec):
    rows = greeted(60) + pairs(60)
    path = write(tmp_path / "one" / "a.jsonl", rows)
    random.Random(1).shuffle(rows)
    write(tmp_path / "two" / "a.jsonl", rows[:70])
    write(tmp_path / "two" / "b.jsonl", rows[70:])
    one, two = (prepare(request(tmp_path, where, phase=1), codec) for where in (path, str(tmp_path / "two")))
    for side in ("train", "eval"):
        assert sorted(asked(codec, getattr(one, side))) == sorted(asked(codec, getattr(two, side)))


def test_a_dialogue_that_continues_another_is_on_its_side(tmp_path, codec):
    rows = greeted(50) + greeted(50, more=("It is so.", "and then?"))
    data = [prepare(request(tmp_path, write(tmp_path / "d.jsonl", rows), phase=phase), codec) for phase in PHASES]
    for side in [part.train for part in data] + [data[0].eval]:
        first = [text.split("\n\n")[0] for text in asked(codec, side)]
        assert first and all(first.count(text) == 2 for text in first)


def test_test_data_with_the_same_opening_leaves_the_training_data_alone(tmp_path, codec):
    write(tmp_path / "set" / "train.jsonl", greeted(30))
    write(tmp_path / "set" / "test.jsonl", greeted(10, start=25))
    data = prepare(request(tmp_path, str(tmp_path / "set"), eval_fraction=0.0), codec)
    assert (len(data.train), len(data.eval)) == (25, 15)
    assert set(asked(codec, data.train)).isdisjoint(asked(codec, data.eval))


@pytest.mark.parametrize("together", [True, False])
def test_test_data_of_a_source_with_few_such_openings_takes_no_more_than_its_own_from_another(
    tmp_path, codec, together
):
    """Each source keys by its own rule: what is rare in the one is common in the other."""
    write(tmp_path / "set" / "train.jsonl", pairs(20))
    write(tmp_path / "set" / "test.jsonl", greeted(3))
    greetings = write(tmp_path / "greetings.jsonl", greeted(30))
    both = [
        request(tmp_path, *paths, eval_fraction=0.0)
        for paths in ([(str(tmp_path / "set"), greetings)] if together else [(str(tmp_path / "set"),), (greetings,)])
    ]
    data = prepare_many(both, codec)
    assert len(data.train) == 20 + 30 - 3 == data.report.train_rows
    trained = codec.tokenizer.batch_decode(data.train["prompt_ids"][:])
    assert not any("Hello" in text and f"What is {i} plus" in text for text in trained for i in range(3))


@pytest.mark.parametrize("together", [True, False])
def test_what_one_source_holds_out_the_other_does_not_train_on(tmp_path, codec, together):
    few = write(tmp_path / "few.jsonl", greeted(4) + pairs(100, start=50))
    many = write(tmp_path / "many.jsonl", greeted(80))
    held_out = None
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):  # at one of which the few are held out
        asks = [
            request(tmp_path, *paths, eval_fraction=fraction)
            for paths in ([(few, many)] if together else [(few,), (many,)])
        ]
        data = prepare_many(asks, codec)
        trained, held_out = (
            set(codec.tokenizer.batch_decode(side["prompt_ids"][:])) for side in (data.train, data.eval)
        )
        assert trained.isdisjoint(held_out)
    assert sum("Hello" in text for text in held_out) > 4


def test_by_opening_and_by_prompt(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", greeted(40) + greeted(40, more=("It is so.", "and then?")))
    sides = [
        {bool(len(side)) for side in (data.train, data.eval)}
        for phase in PHASES
        if (data := _prepared(tmp_path, codec, path, phase)) is not None
    ]
    assert sides == [{True, False}]  # one step has all of it, on one side
    whole = prepare(request(tmp_path, path, split_by="prompt"), codec)
    first = [text.split("\n\n")[0] for text in asked(codec, whole.train)]
    assert len(whole.train) + len(whole.eval) == 80 and {first.count(text) for text in first} == {1, 2}


def _prepared(tmp_path, codec, path, phase):
    try:
        return prepare(request(tmp_path, path, phase=phase, split_by="opening", eval_fraction=0.0), codec)
    except UserError:
        return None


def test_by_a_column(tmp_path, codec):
    rows = [{**row, "conv": number // 5} for number, row in enumerate(pairs(100))]
    path = write(tmp_path / "d.jsonl", rows)
    data = prepare(request(tmp_path, path, kind="comparison", split_by="column:conv"), codec)
    of_row = {f"What is {i} plus {i}?": i // 5 for i in range(100)}
    sides = [{of_row[text.split(":")[-1].strip()] for text in asked(codec, side)} for side in (data.train, data.eval)]
    assert sides[0].isdisjoint(sides[1]) and sides[1] and len(sides[0] | sides[1]) == 20
    with (
        pytest.raises(UserError, match="--split_by column:cnv: .*d.jsonl has no such column; did you mean conv"),
        naming_flags(),
    ):
        prepare(request(tmp_path, path, split_by="column:cnv"), codec)
    write(tmp_path / "d.jsonl", [*rows, *pairs(1, start=200)])
    report = prepare(request(tmp_path, path, split_by="column:conv"), codec).report
    assert report.read.first_bad == [(f"{path}:101", "'conv' is missing, by which to split (--split_by)")]


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(), "the same prompt, 'Same question?'"),
        (dict(kind="prompt"), "the same prompt, 'Same question?'"),
        (dict(split_by="prompt"), "the same prompt, 'Same question?'"),
        (dict(split_by="column:set"), "the same 'set', 'a'"),
    ],
)
def test_one_prompt_for_all_rows_is_said(tmp_path, codec, changes, what):
    rows = [
        {
            "prompt": ("Same question?", "same  QUESTION?")[i % 2],
            "chosen": f"good {i}",
            "rejected": f"bad {i}",
            "set": "a",
        }
        for i in range(40)
    ]
    path = write(tmp_path / "d.jsonl", rows)
    said = f"all 40 rows of {path} have {what}, and a split keeps them together: "
    ends = []
    for phase in PHASES:
        try:
            data = prepare(request(tmp_path, path, phase=phase, **changes), codec)
            ends.append(next(line for line in data.report.lines() if said in line))
        except UserError as error:
            ends.append(str(error))
    assert all(said in end and "--eval_fraction 0" in end and "--split_by column:NAME" in end for end in ends)
    data = prepare(request(tmp_path, path, phase=0, data_split="1,0,0", eval_fraction=0.0), codec)
    assert len(data.train) == 40 and not any(said in line for line in data.report.lines())


def test_openings_that_are_known_are_not_counted_again(tmp_path, codec):
    """Data that has grown since an earlier step is split as it was."""
    path = write(tmp_path / "d.jsonl", greeted(4))
    first = prepare(request(tmp_path, path, eval_fraction=0.0), codec)
    assert first.report.read.shared == {path: []}
    write(tmp_path / "d.jsonl", greeted(60))
    again = prepare(request(tmp_path, path, shared=first.report.read.shared, eval_fraction=0.0), codec)
    assert len(set(again.train["dialogue"])) == 1
    anew = prepare(request(tmp_path, path, eval_fraction=0.0), codec)
    assert len(set(anew.train["dialogue"])) == 60 and len(anew.report.read.shared[path]) == 1
