"""JSON in any arrangement of rows is read as a person would read it."""

import gzip
import json
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import files, json_cursor
from common.data.blend import parse_data_path
from common.data.files import read_rows
from common.data.options import naming_flags
from common.data.reading import ReadReport, fingerprint, read_records
from common.data.rows import FileFormat
from common.errors import UserError
from common.paths import ROOT
from tests.json_strategies import json_values, texts

ROWS = [{"prompt": f"Question {n}? \u00e9\n[{{", "response": f"Answer {n}"} for n in range(12)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def by_column(rows, as_list):
    return {
        name: [row[name] for row in rows] if as_list else {str(n): row[name] for n, row in enumerate(rows)}
        for name in rows[0]
    }


def read(path, text, form=FileFormat()):
    """The rows and the notes."""
    path.write_text(text)
    notes = []
    rows = list(read_rows(path, path.name, form, notes.append))
    assert not [row.problem for row in rows if row.problem]
    return [row.values for row in rows], notes


ARRANGEMENTS = {
    "lines": jsonl(ROWS),
    "array": json.dumps(ROWS),
    "array, a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without line ends": "".join(map(json.dumps, ROWS)),
    "lines that end in commas": "".join(json.dumps(row) + ",\n" for row in ROWS),
    "two arrays": json.dumps(ROWS[:5]) + "\n" + json.dumps(ROWS[5:]),
    "comments first": "// a comment\n# and one\n\n" + json.dumps(ROWS),
    "table by column": json.dumps(by_column(ROWS, False)),
    "table of lists": json.dumps(by_column(ROWS, True), indent=1),
    "table split": json.dumps(
        {"columns": list(ROWS[0]), "index": list(range(12)), "data": [list(row.values()) for row in ROWS]}
    ),
    "table by index": json.dumps({str(n): row for n, row in enumerate(ROWS)}),
    "by id": json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}),
    "under a key": json.dumps({"version": "1", "data": ROWS, "more": {"a": [1]}}),
    "under a key, pretty": json.dumps({"info": {"n": 12}, "rows": ROWS}, indent=4),
    "under any key": json.dumps({"my_rows": ROWS}),
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("head", [files._HEAD, 100])
@pytest.mark.parametrize("chunk", [json_cursor._CHUNK, 7])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_rows_come_in_any_arrangement(tmp_path, monkeypatch, name, head, chunk, arrangement):
    """Also where the file goes on behind what is looked at."""
    monkeypatch.setattr(files, "_HEAD", head)
    monkeypatch.setattr(json_cursor, "_CHUNK", chunk)
    assert read(tmp_path / name, ARRANGEMENTS[arrangement])[0] == ROWS


def test_one_row_is_a_row(tmp_path):
    """What is a list or an object in it is no list of rows."""
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in (
        {"prompt": "q", "response": "a"},
        {"messages": said},
        {"messages": said, "tools": [{"name": "w"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"prompt": said[:1], "completion": said[1:]},
        {"chosen": said[1], "rejected": said[1]},
        {"prompt": "q", "answers": ["a"]},
        {"instruction": "s", "conversation": [{"input": "q", "output": "a"}]},
    ):
        for text in (json.dumps(row), json.dumps(row, indent=2), "\n" + json.dumps(row) + "\n"):
            assert read(tmp_path / "data.json", text)[0] == [row]


def test_the_key_of_the_rows_is_told_or_asked_for(tmp_path):
    path = tmp_path / "data.json"
    text = json.dumps({"version": "1", "train": ROWS[:4], "test": ROWS[4:]}, indent=1)
    with pytest.raises(UserError, match=r"data.json: .* 'train', 'test': .*--data_field") as error, naming_flags():
        read(path, text)
    assert "\n" not in str(error.value)
    assert read(path, text, FileFormat("test"))[0] == ROWS[4:]
    with (
        pytest.raises(UserError, match="--data_field tets: .*'version', 'train', 'test'; did you mean test"),
        naming_flags(),
    ):
        read(path, text, FileFormat("tets"))
    assert read(path, json.dumps({"train": by_column(ROWS, True), "n": 1}), FileFormat("train"))[0] == ROWS
    rows, (note,) = read(path, json.dumps({"version": "1", "data": ROWS}))
    assert rows == ROWS and note == "data.json: its rows are those under 'data'; not used: 'version'"
    assert read(path, jsonl(ROWS), FileFormat("train"))[0] == ROWS  # a blend may have files of both kinds


def test_the_key_decides_what_is_prepared(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": ROWS[:4], "test": ROWS[4:]}))
    forms = [FileFormat(field, encoding) for field in ("train", "test") for encoding in (None, "cp1252")]
    assert len({fingerprint(*parse_data_path([str(path)], form=form), None, None) for form in forms}) == 4
    found = [
        len(list(read_records(parse_data_path([str(path)], form=form), "prompt", report=ReadReport())))
        for form in forms
    ]
    assert found == [4, 4, 8, 8]


def test_comment_lines_are_counted_and_no_bad_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("// my data\n" + jsonl(ROWS[:3]) + "  # and more\n" + jsonl(ROWS[3:]) + "// https://x.y\n")
    report = ReadReport()
    found = list(read_records(parse_data_path([str(path)]), "prompt", report=report))
    assert [item.location for item in found][:4] == [f"{path}:{line}" for line in (2, 3, 4, 6)]
    assert report.sources[str(path)].total == len(found) == 12 and not report.first_bad
    assert report.notes == [f"{path}: 3 comment lines skipped"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("prompt,response\nq,a\n", "it is no JSON: its first line is 'prompt,response'; .*csv"),
        ("{'prompt': 'q'}\n{'prompt': 'r'}\n", "Python's dictionaries.*json.dumps"),
        ('{"a": {"x": [1]}, "prompt": ["q", "r"], "response": ["a"]}', None),
        ('{"prompt": ["q", "r"], "response": ["a"]}', "different lengths: 'prompt' has 2, 'response' has 1"),
        ('{"columns": ["prompt"], "data": [["q"], ["r", "s"]]}', "not every list"),
        ('{"columns": [["prompt", "x"]], "data": [["q"]]}', "not every column has a name"),
        ('{\n "prompt": "q",\n', "the JSON is broken.*at row 1"),
        ('{"prompt": "q"}{"prompt": "r"}{"prompt": ', "the JSON is broken.*at row 3"),
        ('{\n "prompt": "q"\n}\n{\n "prompt" "r"\n}\n', "the JSON is broken.*at row 2"),
        ('[{"prompt": "q"}, {"prompt": ' + "[" * 10_000, "at row 2: it is nested too deeply"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ('[{"prompt": "q"}] [{"prompt": "r"}', "the JSON array is broken.*at row 2"),
        ('[{"prompt": "q"}] and more', "the JSON array is broken"),
    ],
)
def test_what_cannot_be_read_is_named_once(tmp_path, text, said):
    if said is None:
        assert len(read(tmp_path / "data.json", text)[0]) == 1
        return
    with pytest.raises(UserError, match=f"^data.json: .*{said}") as error:
        read(tmp_path / "data.json", text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_broken_line_costs_its_row_alone_wherever_it_is(tmp_path):
    path = tmp_path / "data.jsonl"
    good = jsonl(ROWS)
    for broken in (
        '{"prompt": "q',
        '{"prompt": ',
        '{"prompt": {"a":',
        '{"prompt": "q"} and more',
        "{oops",
        "12",
        '["q"]',
        '{"a": ' * 10_000 + "1" + "}" * 10_000,
    ):
        for text in (f"{broken}\n{good}", f"{good}{broken}\n", f"{broken}\n{broken}\n{good}"):
            path.write_text(text)
            rows = list(read_rows(path, "data"))
            assert [row.values for row in rows if row.values] == ROWS, broken[:30]
            assert len([row for row in rows if row.problem]) == text.count(broken + "\n")


def test_rows_under_a_key_do_not_fill_the_memory(tmp_path):
    """Half a gigabyte, read by a process that may use little more than that for all."""
    path = tmp_path / "data.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"version": 1, "data": [')
        for number in range(512):
            stream.write(b'{"prompt": "' + b"x" * 2**20 + b'"}' + b"," * (number < 511))
        stream.write(b"]}\n")
    program = (
        "import sys; from pathlib import Path; from common.data.files import read_rows\n"
        "print(sum(len(row.values['prompt']) for row in read_rows(Path(sys.argv[1]), 'data')))"
    )
    limit = 700 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert run.stdout.strip() == str(512 * 2**20), run.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(texts, json_values, min_size=1, max_size=3), min_size=2, max_size=4),
    st.sampled_from([None, 1]),
    st.sampled_from(["", "\n", ",\n"]),
    st.integers(1, 40),
)
def test_any_objects_one_after_another_are_rows(tmp_path_factory, rows, indent, between, chunk):
    path = tmp_path_factory.mktemp("objects") / "data.json"
    path.write_text(between.join(json.dumps(row, indent=indent) for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_cursor, "_CHUNK", chunk)
        assert [row.values for row in read_rows(path, "data")] == rows


def test_one_row_with_a_list_in_it_is_a_row_and_no_container(tmp_path):
    row = {"instruction": "q", "completions": [{"prompt": "m", "response": "r"}]}
    assert read(tmp_path / "a.jsonl", json.dumps(row)) == ([row], [])
    assert read(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row))[0] == [row, row]
    held = {"version": "1", "data": ROWS}
    assert read(tmp_path / "a.json", json.dumps(held))[0] == ROWS


@pytest.mark.parametrize("text", ["{0}\n{0}\n", "[{0}, {0}]", "{0}"])
def test_a_dialogue_a_line_is_a_row(tmp_path, text):
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows, _ = read(tmp_path / "a.jsonl", text.replace("{0}", json.dumps(dialogue)))
    assert rows == [{"messages": dialogue}] * text.count("{0}")
