"""Rows of data sets for tests, and the records that layouts make of them."""

from __future__ import annotations

from common.data.adapters import ColumnMap, choose_layout
from common.data.examples import to_records
from common.data.records import Message, Prompt


def records(row, kind, name="somewhere/data.jsonl", columns=None):
    names = ColumnMap(columns)
    names.check({"data.jsonl": row.keys()})
    names = names.within(row.keys())
    layout = choose_layout(name, names.columns(row.keys()), kind, "data.jsonl", [row])
    return to_records(layout, names.rename(row), kind)


def record(row, kind, name="somewhere/data.jsonl", columns=None):
    (only,) = records(row, kind, name, columns)
    return only


def chat(*turns):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]


def sharegpt(*turns):
    """ShareGPT's turns: speaker, text, speaker, text, ..."""
    return [{"from": role, "value": text} for role, text in zip(turns[::2], turns[1::2])]


def dialogue(*turns, system=""):
    first = [Message("system", system)] if system else []
    return Prompt((*first, *(Message(**message) for message in chat(*turns))))
