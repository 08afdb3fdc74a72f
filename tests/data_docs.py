"""The examples behind the tables of docs/data.md: each is read here, and its records are written into the table.

python tests/data_docs.py      writes them into docs/data.md
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.data.blend import parse_data_path
from common.data.reading import ReadReport, read_records
from common.data.records import Comparison, Demonstration, PlainText, Prompt, Record, turns_of
from common.data.rows import FileFormat
from common.errors import UserError

DOCS = ROOT / "docs/data.md"
USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
TWO = [USER, ANSWER, {"role": "user", "content": "And?"}]

LAYOUTS = {
    "prompt, response (or completion, output, answer)": {"prompt": "Q?", "response": "A."},
    "prompt and completion as messages": {"prompt": [USER], "completion": [ANSWER]},
    "prompt, completion, label": {"prompt": "Q?", "completion": "A.", "label": True},
    "instruction, input, output": {"instruction": "Sum up.", "input": "A text.", "output": "A."},
    "... with history and system": {"instruction": "And?", "output": "B.", "history": [["Q?", "A."]], "system": "S."},
    "instruction, context, response": {"instruction": "Who?", "context": "A text.", "response": "A."},
    "question, response or answer": {"system_prompt": "S.", "question": "Q?", "response": "A."},
    "input, output": {"input": "Q?", "output": "A."},
    "other case or spaces in the names": {"Prompt": "Q?", " RESPONSE": "A."},
    "numbers and truth values": {"prompt": "1+1=", "response": 2},
    "messages": {"messages": [*TWO, {"role": "assistant", "content": "B."}]},
    "conversations (ShareGPT)": {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    "messages, an answer not to be trained": {"messages": [*TWO, {"role": "assistant", "content": "B.", "weight": 0}]},
    "messages with reasoning kept apart": {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]},
    "messages with tool calls": {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "42"},
            ANSWER,
        ]
    },
    "prompt, chosen, rejected": {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
    "system, question, chosen, rejected": {"system": "S.", "question": "Q?", "chosen": "A.", "rejected": "B."},
    "instruction, input, chosen, rejected": {
        "instruction": "Sum up.",
        "input": "A text.",
        "chosen": "A.",
        "rejected": "B.",
    },
    "chosen, rejected: transcripts": {
        "chosen": "\n\nHuman: Q?\n\nAssistant: A.",
        "rejected": "\n\nHuman: Q?\n\nAssistant: B.",
    },
    "chosen, rejected: messages": {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "B."}]},
    "conversations, chosen, rejected": {
        "conversations": [{"from": "human", "value": "Q?"}],
        "chosen": {"from": "gpt", "value": "A."},
        "rejected": {"from": "gpt", "value": "B."},
    },
    "several rejected (or chosen) answers": {"prompt": "Q?", "chosen": "A.", "rejected": ["B.", "C."]},
    "a list of answers, best first": {"prompt": "Q?", "responses": ["A.", "B.", "C."]},
    "... with scores (or ranks)": {"prompt": "Q?", "responses": ["B.", "A."], "scores": [1, 5]},
    "prompt": {"prompt": "Q?"},
    "prompt as messages, and what checks it": {"prompt": [USER], "reward_model": {"ground_truth": "4"}},
    "messages that end with a question": {"messages": TWO},
    "text": {"text": "Once upon a time."},
}

PLAIN = json.dumps({"prompt": "Q?", "response": "A."})


def _zipped(name: str, text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, text)
    return content.getvalue()


FILES = {  # name of the file, content, how it is shown, format
    "JSON lines": ("a.jsonl", f"{PLAIN}\n", None, {}),
    "JSON array": ("a.json", f"[{PLAIN}]", None, {}),
    "the same under the other name": ("a.jsonl", f"[{PLAIN}]", None, {}),
    "objects over several lines": ("a.json", '{"prompt": "Q?",\n "response": "A."}', None, {}),
    "rows under a key": ("a.json", f'{{"version": 1, "data": [{PLAIN}]}}', None, {}),
    "... one of several": ("a.json", f'{{"data": [{PLAIN}], "old": [{PLAIN}]}}', None, {"data_field": "data"}),
    "by column": ("a.json", '{"prompt": ["Q?"], "response": ["A."]}', None, {}),
    "by column, pandas": ("a.json", '{"prompt": {"0": "Q?"}, "response": {"0": "A."}}', None, {}),
    "comments in JSON lines": ("a.jsonl", f"// from the lab\n{PLAIN}\n", None, {}),
    "CSV": ("a.csv", 'prompt,response\nQ?,"A."\n', None, {}),
    "CSV, other separators": ("a.csv", "prompt;response\nQ?;A.\n", None, {}),
    "CSV, spaces behind commas": ("a.csv", 'prompt, response\n"Q?", "A."\n', None, {}),
    "TSV": ("a.tsv", "prompt\tresponse\nQ?\tA.\n", None, {}),
    "plain text, a text a line": ("a.txt", "Once upon a time.\n", None, {}),
    "gzip, whatever the name": ("a.jsonl", gzip.compress(PLAIN.encode()), "(gzip)", {}),
    "zip": ("a.zip", _zipped("a.jsonl", PLAIN), "(zip of a.jsonl)", {}),
    "UTF-16, by its mark": ("a.jsonl", PLAIN.encode("utf-16"), "(UTF-16)", {}),
    "another encoding": (
        "a.csv",
        "prompt,response\nOù?,Là.\n".encode("cp1252"),
        "(Windows-1252)",
        {"encoding": "cp1252"},
    ),
}


def records(content: bytes, name: str, kind: str, form: FileFormat = FileFormat()) -> list[Record]:
    """What a file with that content gives; [] if nothing of the kind."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        try:
            return [
                found.record
                for found in read_records(parse_data_path([str(path)], form=form), kind, report=ReadReport())
            ]
        except UserError:
            return []


def gives(content: bytes, name: str = "a.jsonl", form: FileFormat = FileFormat()) -> str:
    """The records of a file in words, of the kind that says most."""
    for kind in ("comparison", "demonstration", "prompt", "text"):
        found = records(content, name, kind, form)
        if found:
            return f"{kind}: " + "; ".join(map(_in_words, found))
    return "nothing"


def _in_words(record: Record) -> str:
    if isinstance(record, PlainText):
        return _code(record.text)
    if isinstance(record, Prompt):
        return " ".join(f"{message.role} {_code(message.content)}{_more(message)}" for message in record.messages)
    if isinstance(record, Demonstration):
        return f"{_in_words(record.prompt)} → {_answer(record.response)}"
    assert isinstance(record, Comparison)
    return f"{_in_words(record.prompt)} → {_answer(record.chosen)} over {_answer(record.rejected)}"


def _answer(answer) -> str:
    return " ".join(f"{_code(turn.content)}{_more(turn)}" for turn in turns_of(answer))


def _more(message) -> str:
    return f" with {', '.join(json.loads(message.more))}" if message.more else ""


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`" if text else "(no text)"


def layout_lines() -> Iterator[str]:
    yield "| columns | a row | gives |"
    yield "|---|---|---|"
    for name, row in LAYOUTS.items():
        text = json.dumps(row)
        yield f"| {name} | {_code(text)} | {gives(text.encode())} |"


def file_lines() -> Iterator[str]:
    yield "| file | example | flags | gives |"
    yield "|---|---|---|---|"
    for what, (name, content, shown, form) in FILES.items():
        content = content.encode() if isinstance(content, str) else content
        flags = " ".join(f"`--{flag} {value}`" for flag, value in form.items())
        yield (
            f"| {what} | {name}: {shown or _code(content.decode())} | {flags} | "
            f"{gives(content, name, FileFormat(**form))} |"
        )


def with_tables(document: str) -> str:
    """The document with its tables made anew."""
    for name, lines in (("layouts", layout_lines()), ("files", file_lines())):
        table = "\n".join(lines)
        document, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda found: found[1] + table + found[2], document, flags=re.S
        )
        assert count == 1, f"{DOCS} has no place for the table of {name}"
    return document


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
