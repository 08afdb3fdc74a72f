"""Encodings, compression and kinds of files are recognised by content, not by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from common.data.blend import SourceSpec, parse_data_path
from common.data.files import MAX_ROW_BYTES, read_rows
from common.data.options import naming_flags
from common.data.reading import ReadReport, read_records
from common.data.rows import FileFormat
from common.data.sources import open_source
from common.errors import UserError
from inference.generate import GenerateConfig
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig

ROWS = [{"prompt": f"O\u00f9 {n}?", "response": f"L\u00e0 \u201c{n}\u201d \u2014 voil\u00e0"} for n in range(40)]


def jsonl(rows=ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows=ROWS) -> str:
    return "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in rows)


def read(path, form=FileFormat()):
    return [row.values for row in read_rows(path, path.name, form)]


def refusal(path, form=FileFormat()) -> str:
    with pytest.raises(UserError) as error, naming_flags():
        read(path, form)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "name, text",
    [("a.jsonl", jsonl()), ("a.json", json.dumps(ROWS)), ("a.csv", table()), ("a.csv", table().replace("\n", "\r"))],
)
@pytest.mark.parametrize("form", [FileFormat(), FileFormat(encoding="cp1252")])
def test_unicode_is_told_by_its_mark(tmp_path, encoding, name, text, form):
    """--encoding is for the files of a blend that are no Unicode."""
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name, form) == ROWS


def test_big_endian_with_its_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("\ufeff".encode("utf-16-be") + jsonl().encode("utf-16-be"))
    assert read(tmp_path / "a.jsonl") == ROWS


@pytest.mark.parametrize(
    "name, text",
    [("a.jsonl", jsonl()), ("a.json", json.dumps(ROWS, ensure_ascii=False)), ("a.csv", table()), ("a.csv.gz", table())],
)
def test_another_encoding_is_named_and_can_be_given(tmp_path, name, text):
    content = text.encode("cp1252")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert refusal(tmp_path / name) == (
        f"{name}: it is not UTF-8; it looks like Windows-1252: convert it, or say what it is, such as --encoding cp1252"
    )
    assert read(tmp_path / name, FileFormat(encoding="cp1252")) == ROWS


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("cp1251", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440"),
        ("shift_jis", "\u6771\u4eac\u3078"),
        ("gb18030", "\u4f60\u597d\u4e16\u754c"),
        ("euc_kr", "\uc548\ub155"),
    ],
)
def test_encodings_that_are_not_western_are_not_guessed(tmp_path, encoding, text):
    rows = [{"prompt": f"{text} {n}"} for n in range(20)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows).encode(encoding))
    assert "it is not UTF-8: convert it, or say what it is, such as --encoding" in refusal(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", FileFormat(encoding=encoding)) == rows


def test_a_few_rows_in_another_encoding_are_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    for good in (jsonl() * 10, '{"prompt": "plain"}\n' * 400):
        path.write_bytes(good.encode() + jsonl(ROWS[:4]).encode("cp1252"))
        report = ReadReport()
        assert len(list(read_records([SourceSpec(str(path))], "prompt", report=report))) == 400
        assert report.first_bad == [(f"{path}:{line}", "'prompt' is invalid UTF-8") for line in range(401, 405)]


@pytest.mark.parametrize("config, words", [(SFTConfig, []), (PPOConfig, []), (GenerateConfig, ["x.jsonl"])])
def test_an_encoding_that_there_is_not_is_refused_at_the_door(config, words):
    for name in ("utf9", "base64", "rot13"):
        with pytest.raises(UserError, match=f"^--encoding {name}: no such encoding"):
            config(encoding=name, **({"data_path": tuple(words)} if words else {})).validate()


def test_the_format_options_apply_to_every_source_of_a_step():
    form = FileFormat("rows", "cp1252")
    said = {"data_field": "rows", "encoding": "cp1252"}
    configs = [SFTConfig(**said, sft_only_data_path=("b",)), PPOConfig(**said, unsupervised_dataset_name="c")]
    assert [spec.form for config in configs for spec in config.all_sources()] == [form] * 4


PACKED = {
    "gzip": gzip.compress,
    "zstd": lambda content: pyarrow.Codec("zstd").compress(content).to_pybytes(),
    "two zstd frames": lambda content: b"".join(
        pyarrow.Codec("zstd").compress(part).to_pybytes() for part in (content[:100], content[100:])
    ),
    "nothing": lambda content: content,
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.json.gz"])
def test_packing_is_told_by_the_first_bytes(tmp_path, packing, name):
    text = {"jsonl": jsonl(), "csv": table(), "json": json.dumps(ROWS)}[name.split(".")[1]]
    (tmp_path / name).write_bytes(PACKED[packing](text.encode()))
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_is_named(tmp_path, packing):
    whole = PACKED[packing](jsonl().encode())
    (tmp_path / "a.jsonl").write_bytes(whole[:-9])
    assert "a.jsonl: cannot be read to its end" in refusal(tmp_path / "a.jsonl")


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def parts_of(source):
    return [(part.name, part.split, [row.values for row in part.rows()]) for part in source.parts]


def test_a_zip_archive_is_as_a_directory(tmp_path):
    table_of_rows = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table_of_rows)
    files = {
        "data/train.csv": table(),
        "data/test.jsonl.gz": gzip.compress(jsonl(ROWS[:3]).encode()),
        "data/train-2.parquet": table_of_rows.getvalue(),
        "README.md": "text",
        "__MACOSX/data/._train.csv": "x",
    }
    expected = [
        ("data/test.jsonl.gz", "test", ROWS[:3]),
        ("data/train-2.parquet", "train", ROWS),
        ("data/train.csv", "train", ROWS),
    ]
    for name in ("data.zip", "data.jsonl"):
        path = zipped(tmp_path / name, files)
        source = open_source(SourceSpec(path))
        assert parts_of(source) == expected
        assert [row.location for row in source.parts[2].rows()][:1] == [f"{path}/data/train.csv:2"]
        (tmp_path / name).rename(tmp_path / "other")
    (tmp_path / "sub").mkdir()
    zipped(tmp_path / "sub" / "more.zip", files)
    assert parts_of(open_source(SourceSpec(str(tmp_path / "sub")))) == [
        (f"more.zip/{name}", split, rows) for name, split, rows in expected
    ]


def test_zip_archives_without_data(tmp_path):
    for files, said in (
        ({"notes.md": "x"}, "holds no data file; it holds notes.md"),
        ({"[Content_Types].xml": "x", "xl/workbook.xml": "x"}, "an Office document: save it as CSV"),
    ):
        with pytest.raises(UserError, match=said):
            open_source(SourceSpec(zipped(tmp_path / "a.zip", files)))
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04" + b"x" * 100)
    with pytest.raises(UserError, match="a.zip: the zip archive cannot be read"):
        open_source(SourceSpec(str(tmp_path / "a.zip")))


def test_a_row_that_unpacks_to_gigabytes_is_one_bad_row(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jsonl": '{"prompt": "' + "x" * (2 * MAX_ROW_BYTES) + '"}\n' + jsonl()})
    (part,) = open_source(SourceSpec(path)).parts
    rows = list(part.rows())
    assert [row.problem for row in rows][:2] == ["line longer than 8 MiB", None] and len(rows) == 41


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return content.getvalue()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "an HTML page"),
        (b" \n<html>", "an HTML page"),
        (b"<?xml version='1.0'?><rows/>", "XML"),
        (b"%PDF-1.7\n", "a PDF"),
        (pickle.dumps(ROWS), "a Python pickle"),
        (tar(), "a tar archive: unpack it"),
        (gzip.compress(tar()), "a tar archive: unpack it"),
        (bz2.compress(b"x"), "a bzip2 archive"),
        (lzma.compress(b"x"), "an xz archive"),
        (gzip.compress(gzip.compress(b"{}")), "gzip within an archive"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"{\\rtf1 text}", "an RTF document"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document"),
        (b"\x01\0\0\0\x02" * 50, "it is no text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"Rar!\x1a\x07", "a rar archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_holds_no_rows_is_refused_by_what_it_is(tmp_path, content, said, name):
    if name == "a.parquet" and said == "it is no text":
        said = "cannot be read as parquet"
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_a_file_of_another_kind_than_its_name_says_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == ROWS
    for name in ("a.csv", "a.txt", "a.tsv"):
        for text in (jsonl(), json.dumps(ROWS)):
            (tmp_path / name).write_text(text)
            notes = []
            assert [row.values for row in read_rows(tmp_path / name, name, note=notes.append)] == ROWS
            assert notes == [f"{name}: it holds JSON, whatever its name says"]


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("")
        report = ReadReport()
        assert not list(read_records([SourceSpec(str(tmp_path / name))], "prompt", report=report))
        with pytest.raises(UserError, match=f"{name}: none of its 0 rows can be used: it is empty"):
            report.check(0.02)


def test_each_line_of_plain_text_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b'One, "two";\r\n\r\n  {three}\nfour')
    assert read(tmp_path / "a.txt") == [{"text": text} for text in ('One, "two";', "", "  {three}", "four")]
    found = list(read_records(parse_data_path([str(tmp_path / "a.txt")]), "text", report=ReadReport()))
    assert [item.location.rpartition(":")[2] for item in found] == ["1", "3", "4"]
    asked = read_records(
        parse_data_path([str(tmp_path / "a.txt")]), "prompt", columns={"prompt": "text"}, report=ReadReport()
    )
    assert next(asked).record.first_user_turn == 'One, "two";'


def test_texts_and_archives_beside_data_are_left_out(tmp_path):
    (tmp_path / "notes.txt").write_text("Notes")
    (tmp_path / "README.txt").write_text("Read me")
    assert [part.name for part in open_source(SourceSpec(str(tmp_path))).parts] == ["notes.txt"]
    (tmp_path / "train.jsonl").write_text(jsonl())
    zipped(tmp_path / "all.zip", {"train.jsonl": jsonl()})
    source = open_source(SourceSpec(str(tmp_path)))
    assert [part.name for part in source.parts] == ["train.jsonl"]
    assert source.notes == [f"{tmp_path}: left out, being texts or archives beside data: all.zip, notes.txt"]


@pytest.mark.parametrize("text", ["PAR1 is a word", "ORCHESTRA", "GIF89a", "BZh", "#!/bin/sh", "%", "sep=;"])
def test_plain_text_may_begin_as_it_likes(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [{"text": text}]


def test_values_of_a_table_stay_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\n1e3,007\ntrue,null\n")
    assert read(tmp_path / "a.csv") == [{"prompt": "1e3", "response": "007"}, {"prompt": "true", "response": "null"}]


def test_a_path_that_is_not_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match="--data_path x{200}: cannot be read: File name too long"), naming_flags():
        open_source(SourceSpec("x" * 5000))
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        open_source(SourceSpec(str(tmp_path / "a.jsonl")))
    (tmp_path / "model.safetensors").write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match="model.safetensors: it is a PDF: extract its text; understood are"):
        open_source(SourceSpec(str(tmp_path / "model.safetensors")))


def test_json_of_one_long_line_is_judged_by_its_rows(tmp_path):
    rows = [{"prompt": f"Caf\u00e9 {n}", "response": "x" * 500} for n in range(10_000)]  # more than is looked at
    (tmp_path / "a.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("cp1252"))
    assert read(tmp_path / "a.json", FileFormat(encoding="cp1252")) == rows
    assert "looks like Windows-1252" in refusal(tmp_path / "a.json")
    few = json.dumps(ROWS, ensure_ascii=False).encode().replace("voil\u00e0".encode(), b"voil\xe0", 1)
    for form in (FileFormat(), FileFormat(encoding="cp1252")):
        (tmp_path / "b.json").write_bytes(few)
        first, *rest = read(tmp_path / "b.json", form)
        assert rest == ROWS[1:] and first["prompt"] == ROWS[0]["prompt"] and "\udcff" in first["response"]


def test_json_in_a_text_file_over_several_lines(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps([{"prompt": "q", "response": "a"}] * 2, indent=1))
    assert read(tmp_path / "a.txt") == [{"prompt": "q", "response": "a"}] * 2
    (tmp_path / "b.txt").write_text("[a] word\n{not json}\n")
    assert read(tmp_path / "b.txt") == [{"text": "[a] word"}, {"text": "{not json}"}]


def test_a_separator_that_the_file_names_or_its_name_does(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nprompt;response\nq, 1;a\nr;\n")
    assert read(tmp_path / "a.csv") == [{"prompt": "q, 1", "response": "a"}, {"prompt": "r", "response": ""}]
    assert [row.location for row in read_rows(tmp_path / "a.csv", "a.csv", FileFormat())] == ["a.csv:3", "a.csv:4"]
    (tmp_path / "a.tsv").write_text("prompt\tresponse\nq, and, more\ta, b\nr, s, t\tc\n")
    assert read(tmp_path / "a.tsv") == [
        {"prompt": "q, and, more", "response": "a, b"},
        {"prompt": "r, s, t", "response": "c"},
    ]
