"""For any file, the decoded prepared data equal the rows of the file."""

import csv
import gzip
import io
import json
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from common.data.blend import parse_data_path
from common.data.prepare import prepare
from common.data.rows import FileFormat
from common.data.tokenization import load_tokenizer, make_codec
from tests.preparation import request
from tests.tokenizers_built import byte_level_bpe

ROWS = [
    {"prompt": f"O\u00f9 est le n\u00ba {n}; l\u00e0, ou ici?", "response": f"L\u00e0, \u00ab{n}\u00bb;\nvoil\u00e0."}
    for n in range(30)
]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def jsonl(**style) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, **style) + "\n" for row in ROWS)


def table(separator: str, end: str = "\n", after: str = "") -> str:
    quoted = [['"' + row[name].replace('"', '""') + '"' for name in ("prompt", "response")] for row in ROWS]
    return "".join((separator + after).join(fields) + end for fields in [["prompt", "response"], *quoted])


def by_excel() -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["prompt", "response"], dialect="excel-tab")
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue()


def zipped(name: str, text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, text)
    return content.getvalue()


def parquet() -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), content)
    return content.getvalue()


FILES = {
    "lines.jsonl": jsonl(),
    "array.jsonl": json.dumps(ROWS),
    "pretty.json": jsonl(indent=2),
    "nested.json": json.dumps({"version": "0.1", "data": ROWS}),
    "columns.json": json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "comments.jsonl": "// my data\n" + jsonl(),
    "utf16.jsonl": jsonl().encode("utf-16"),
    "marked.csv": table(",").encode("utf-8-sig"),
    "utf16.csv": table(";").encode("utf-16"),
    "comma.csv": table(","),
    "semicolon.csv": table(";"),
    "spaces.csv": table(",", after=" "),
    "bar.csv": table("|"),
    "tab.tsv": by_excel(),
    "old-mac.csv": table(",", "\r"),
    "western.csv": table(";").encode("cp1252"),
    "western.jsonl": jsonl().encode("latin-1"),
    "isgz.jsonl": gzip.compress(jsonl().encode()),
    "plain.jsonl.gz": jsonl(),
    "z.jsonl.zst": pyarrow.Codec("zstd").compress(jsonl().encode()).to_pybytes(),
    "rows.zip": zipped("a.jsonl", jsonl()),
    "other.jsonl": parquet(),
    "json.txt": jsonl(),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_prepared_is_what_the_file_says(tmp_path, codec, name):
    content = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    form = FileFormat(encoding="cp1252" if name.startswith("western") else None)
    asked = request(tmp_path, "-", data_path=parse_data_path([str(tmp_path / name)], form=form))
    for data in (prepare(asked, codec), prepare(asked, codec)):
        found = [
            tuple(codec.tokenizer.decode(row[ids], skip_special_tokens=True) for ids in ("prompt_ids", "response_ids"))
            for row in [*data.train, *data.eval]
        ]
        assert sorted(found) == sorted(
            (f"\n\nHuman: {row['prompt']}\n\nAssistant:", f" {row['response']}") for row in ROWS
        )
        (counts,) = data.report.read.sources.values()
        assert (counts.total, counts.bad) == (30, 0)


def test_another_key_or_encoding_is_prepared_anew(tmp_path, codec):
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps({"a": ROWS[:10], "b": ROWS[10:]}, ensure_ascii=False).encode("cp1252"))
    data = [
        prepare(request(tmp_path, "-", data_path=parse_data_path([str(path)], form=FileFormat(*form))), codec)
        for form in (("a", "cp1252"), ("b", "cp1252"), ("b", "cp437"))
    ]
    assert len({part.key for part in data}) == 3
    assert [len(part.train) + len(part.eval) for part in data] == [10, 20, 20]
