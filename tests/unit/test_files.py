"""Rows of local files: good rows are read, bad ones are counted with their location, unreadable files raise."""

import csv
import gzip
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import files, json_cursor
from common.data.blend import SourceSpec
from common.data.files import MAX_ROW_BYTES, read_rows
from common.data.reading import ReadReport, read_records
from common.errors import UserError
from common.paths import ROOT
from tests.json_strategies import json_values, texts

ROWS = [{"prompt": f'Question {n}? \u00e9\n"quoted", [a] {{b}}', "response": f"Answer {n}"} for n in range(700)]
TEXTS = [{"text": f'Line {n}: \u00e9, "quoted"; {{b}}\t|'} for n in range(700)]


def write(path: Path, rows) -> Path:
    """Write `rows` in the format that the name of `path` asks for."""
    packing = path.suffix if path.suffix in (".gz", ".zst", ".zip") else ""
    name = path.name.removesuffix(packing)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        return path
    stream = io.StringIO(newline="")
    if name.endswith((".csv", ".tsv")):
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
    elif name.endswith(".json"):
        json.dump(rows, stream, indent=1)
    elif name.endswith(".txt"):
        stream.writelines(row["text"] + "\n" for row in rows)
    else:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(packed(stream.getvalue().encode(), packing))
    return path


def packed(content: bytes, packing: str) -> bytes:
    """What a file of that suffix holds."""
    if packing == ".gz":
        return gzip.compress(content)
    return pyarrow.Codec("zstd").compress(content).to_pybytes() if packing == ".zst" else content


def good(path):
    return [row.values for row in read_rows(path, path.name) if row.problem is None]


def bad(path):
    return [(row.location, row.problem) for row in read_rows(path, path.name) if row.problem is not None]


@pytest.mark.parametrize("name", [suffix for suffix in files.SUFFIXES if suffix != ".zip"])
def test_every_format_gives_the_rows_that_were_written(tmp_path, name):
    written = TEXTS if ".txt" in name else ROWS
    path = write(tmp_path / f"data{name}", written)
    rows = list(read_rows(path, "data"))
    assert [row.values for row in rows] == written
    assert len({row.location for row in rows}) == len(ROWS)


def test_a_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert good(path) == ROWS
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    assert good(path) == ROWS


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(texts, json_values, max_size=4)), st.sampled_from([None, 1]), st.integers(1, 40))
def test_arrays_are_read_whatever_the_place_where_a_chunk_ends(tmp_path_factory, rows, indent, chunk):
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    usual, json_cursor._CHUNK = json_cursor._CHUNK, chunk
    try:
        assert good(path) == rows
    finally:
        json_cursor._CHUNK = usual


def test_bad_lines_are_named_and_the_good_ones_between_them_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    ok = b'{"prompt": "fine"}'
    lines = [
        ok,
        b"",
        b"   ",
        b'{"prompt": ',
        b"\xff\xfe{}",
        b'{"prompt": "a\x00"}',
        b'["a"]',
        b"7",
        ok,
        b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
        b"[" * 100_000,
        ok,
    ]
    path.write_bytes(b"\n".join(lines))
    assert good(path) == [{"prompt": "fine"}] * 3
    assert bad(path) == [
        ("data.jsonl:4", "broken JSON"),
        ("data.jsonl:5", "broken JSON"),
        ("data.jsonl:6", "NUL bytes"),
        ("data.jsonl:7", "not a JSON object"),
        ("data.jsonl:8", "not a JSON object"),
        ("data.jsonl:10", "line longer than 8 MiB"),
        ("data.jsonl:11", "broken JSON"),
    ]


def test_a_row_of_the_greatest_length_is_still_read(tmp_path):
    path = tmp_path / "data.jsonl"
    frame = len('{"prompt": ""}\n')
    for length, count in ((MAX_ROW_BYTES - frame, 2), (MAX_ROW_BYTES, 1)):
        path.write_text('{"prompt": "%s"}\n{"prompt": "b"}\n' % ("x" * length))
        assert len(good(path)) == count


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    """A gigabyte in one compressed line, read by a process that may use less than that."""
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(1024):
            stream.write(b"x" * 2**20)
        stream.write(b'\n{"prompt": "fine"}\n')
    limit = 700 * 2**20
    program = (
        "import sys; from pathlib import Path; from common.data.files import read_rows\n"
        "print([row.problem for row in read_rows(Path(sys.argv[1]), 'data')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert run.stdout.strip() == "['line longer than 8 MiB', None]", run.stderr


def test_bad_csv_rows(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'prompt,response\na,b\n\na,b,c\na\n"x"y,b\n' + b"x" * 9_000_000 + b',b\n"a\nb",c\n')
    assert good(path) == [{"prompt": "a", "response": "b"}, {"prompt": "a\nb", "response": "c"}]
    assert [where for where, _ in bad(path)] == ["data.csv:4", "data.csv:5", "data.csv:6", "data.csv:7"]


@pytest.mark.parametrize("end", ["", 'What is "this"?,"It is so."\n', 'a,"b"\nc,"\n'])
def test_the_lines_that_an_open_quote_swallows_are_counted(tmp_path, end):
    path = tmp_path / "data.csv"
    rows = [f"question {n},answer {n}\n" for n in range(1000)]
    rows[500] = '"' + rows[500]
    path.write_text("prompt,response\n" + "".join(rows) + end)
    places = [where for where, _ in bad(path)]
    assert places == [f"data.csv:{line}" for line in range(502, 1002 + end.count("\n"))]
    assert "line 100" in bad(path)[0][1] and "quote" in bad(path)[0][1]
    assert [row["prompt"] for row in good(path)] == [f"question {n}" for n in range(500)]
    report = ReadReport()
    list(read_records([SourceSpec(str(path))], "demonstration", report=report))
    with pytest.raises(UserError, match=r"data.csv: 50.*data.csv:502: .*quote"):
        report.check(0.02)


def test_an_open_quote_swallows_no_more_than_the_longest_row(tmp_path):
    path = tmp_path / "data.csv"
    count = 400_000
    path.write_text('prompt,response\n"a,b\n' + "some question,some answer\n" * count)
    lost = [int(where.split(":")[1]) for where, _ in bad(path)]
    assert lost == list(range(2, 2 + len(lost)))
    assert len(lost) < MAX_ROW_BYTES / 20
    assert len(good(path)) == count + 1 - len(lost) > 10_000


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,response\n"a\nb",c\n"d\ne",f,g\nh,i\n')
    assert [row.location for row in read_rows(path, "data.csv")] == ["data.csv:2", "data.csv:4", "data.csv:6"]
    assert bad(path) == [("data.csv:4", "3 fields where the header has 2")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_separator_and_the_line_ends_of_a_table_are_told_by_looking(tmp_path, mark, name, end):
    path = tmp_path / name
    others = "".join({",", ";", "\t", "|"} - {mark})
    rows = [{"prompt": f"q{others} {n}", "response": f'a{mark}{end}"{n}"', "number": "007"} for n in range(30)]
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter=mark, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    assert good(path) == rows and not bad(path)


def test_a_table_may_have_one_column(tmp_path):
    path = tmp_path / "data.csv"
    for header in ("prompt", "prompt; or question"):
        path.write_text(f"{header}\nq; r\n" if header == "prompt" else f"{header}\nq\nr\n")
        assert [list(row) for row in good(path)] == [[header]] * (1 if header == "prompt" else 2)


@pytest.mark.parametrize(
    "text, rows",
    [
        ('prompt, response\n"q 1", "a, 1"\n"q 2", "a 2"\n', [("q 1", "a, 1"), ("q 2", "a 2")]),
        ('prompt,response\n"q 1", "a, 1"\n"q 2", "a ""2"""\n', [("q 1", "a, 1"), ("q 2", 'a "2"')]),
        ("prompt; response\nq 1; a 1\nq 2; a 2\n", [("q 1", "a 1"), ("q 2", "a 2")]),
        ("prompt,response\nq 1,    return 1\nq 2, 7\n", [("q 1", "    return 1"), ("q 2", " 7")]),
        ("prompt , response \nq 1,a 1\n", [("q 1", "a 1")]),
    ],
)
def test_spaces_after_separators_belong_to_a_field_unless_the_table_is_written_so(tmp_path, text, rows):
    path = tmp_path / "data.csv"
    path.write_text(text)
    assert good(path) == [{"prompt": prompt, "response": response} for prompt, response in rows]


def test_a_csv_file_needs_distinct_column_names(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(UserError, match="data.csv:1.*twice"):
        good(path)


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": ', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}, o]', "["])
def test_a_broken_array_is_an_error_that_names_the_row(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError, match="data.json: the JSON array is broken"):
        good(path)


def test_elements_that_are_no_objects_are_counted(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, 12, "b", null]')
    assert good(path) == [{"a": 1}]
    assert [where for where, _ in bad(path)] == ["data.json:2", "data.json:3", "data.json:4"]


def test_damaged_files_are_named(tmp_path):
    whole = write(tmp_path / "whole.jsonl.gz", ROWS).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.jsonl.gz").write_bytes(b"not compressed")
    whole = write(tmp_path / "whole.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for name, why in {
        "cut.jsonl.gz": "end",
        "none.jsonl.gz": "no JSON: .*'not compressed'",
        "cut.parquet": "parquet",
        "pointer.parquet": "git lfs pull",
    }.items():
        with pytest.raises(UserError, match=f"(?s){name}.*{why}"):
            good(tmp_path / name)


def test_invalid_utf8_in_parquet_costs_its_row_alone(tmp_path):
    texts = pyarrow.array([b"good", b"\xff\xfe", b"too"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "data.parquet")
    assert good(tmp_path / "data.parquet") == [{"prompt": "good"}, {"prompt": "too"}]
    assert bad(tmp_path / "data.parquet") == [("data.parquet:2", "invalid UTF-8")]


def test_one_row_group_of_a_parquet_file_is_in_memory_at_once(tmp_path):
    rows = [{"prompt": str(number) + "x" * 2**20} for number in range(64)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        tmp_path / "data.parquet",
        compression="none",
        use_dictionary=False,
        row_group_size=4,
    )
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, row in enumerate(read_rows(tmp_path / "data.parquet", "data.parquet")):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert row.values == rows[number]
    assert number == 63 and most < 2**25
