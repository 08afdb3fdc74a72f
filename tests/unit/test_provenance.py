"""provenance.json is written and read back, and a damaged one is refused with the reason."""

import json
import re

import pytest

from common.artifacts.provenance import FILE, FORMAT, Provenance, read_provenance
from common.errors import UserError

WHOLE = Provenance(
    step="reward",
    base="owner/model",
    tokenizer="f" * 64,
    template="chat",
    end_token="</s>",
    pad_token="<pad>",
    data_split="2,4,4",
    eval_fraction=0.05,
    data_path=("a", "b"),
    score_mean=0.5,
    score_std=2.0,
    shared_openings={"a": [3, -5], "b": []},
)


def written(directory, **changes):
    WHOLE.write(directory)
    path = directory / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_written_provenance_reads_back_equal(tmp_path):
    written(tmp_path)
    again = read_provenance(tmp_path)
    assert (again.score_mean, again.score_std, again.template) == (0.5, 2.0, "chat")
    assert again.shared_openings == {"a": [3, -5], "b": []}
    written(tmp_path, score_mean=None, score_std=None, eval_fraction=0)
    assert read_provenance(tmp_path).score_std is None


def test_a_field_that_is_unknown_is_ignored_and_a_file_without_a_format_is_of_the_first(tmp_path):
    written(tmp_path, unheard_of=1)
    path = tmp_path / FILE
    values = json.loads(path.read_text())
    assert values.pop("format") == FORMAT
    path.write_text(json.dumps(values))
    again = read_provenance(tmp_path)
    assert (again.step, again.score_std) == (WHOLE.step, WHOLE.score_std)


@pytest.mark.parametrize("number, age", [(FORMAT - 1, "an older"), (FORMAT + 1, "a newer")])
def test_another_format_is_one_sentence(number, age, tmp_path):
    written(tmp_path, format=number)
    line = (
        f"{tmp_path / FILE}: it has format {number}, {age} one than format {FORMAT} of this version: "
        "use the version that wrote it, or train the model again"
    )
    with pytest.raises(UserError, match=line):
        read_provenance(tmp_path)


@pytest.mark.parametrize("number", ["two", str(FORMAT), True, float(FORMAT), None, [FORMAT]])
def test_a_format_that_is_no_whole_number_is_damage(number, tmp_path):
    written(tmp_path, format=number)
    line = f"{tmp_path / FILE} is damaged (format is {str(number)!r}): train the model again"
    with pytest.raises(UserError, match=re.escape(line)):
        read_provenance(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("score_mean", "0.5"),
        ("score_mean", [0.5]),
        ("score_std", True),
        ("score_std", {}),
        ("score_std", 10**400),
        ("template", 3),
        ("template", None),
        ("end_token", ["</s>"]),
        ("tokenizer", 0.5),
        ("data_path", "a"),
        ("data_path", [1]),
        ("versions", ["torch"]),
        ("versions", {"torch": 2}),
        ("eval_fraction", "0.05"),
        ("eval_fraction", 7),
        ("data_split", "1,x,2"),
        ("data_split", [1, 2]),
        ("shared_openings", {"a": ["x"]}),
        ("shared_openings", {"a": 3}),
        ("shared_openings", [1]),
    ],
)
def test_a_value_of_another_type_is_named(name, value, tmp_path):
    written(tmp_path, **{name: value})
    with pytest.raises(UserError, match=f"{tmp_path / FILE} is damaged .*{name}.*: train the model again") as refused:
        read_provenance(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"[" * 10_000 + b"]" * 10_000,
        b"\xff\xfe",
        b'{"a":' * 100_000,
        b"{}",
        b'{"step": NaN}',
        b"\x80\x04\x95pickle",
    ],
)
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / FILE} is damaged") as refused:
        read_provenance(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("names", [["template"], ["step", "end_token", "eval_fraction"]])
def test_values_that_lack_are_named_in_plain_words(names, tmp_path):
    written(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    for name in [*names, "score_mean"]:  # the last may lack
        del values[name]
    (tmp_path / FILE).write_text(json.dumps(values))
    line = f"{tmp_path / FILE} is damaged (it has no {', no '.join(names)}): train the model again or remove the file"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        read_provenance(tmp_path)
