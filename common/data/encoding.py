"""Turns records into rows of ids, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow
from datasets import Features, Value

from common.data.errors import TemplateError
from common.data.keeping import KEPT, kept_json
from common.data.preparation_report import PreparationReport
from common.data.reading import SourcedRecord
from common.data.records import Comparison, Demonstration, Feedback, PlainText, Prompt, Record, Response, turns_of
from common.data.templates import marks
from common.data.tokenization import Codec
from common.errors import UserError

_COLUMNS = {
    "demonstration": ("prompt_ids", "response_ids"),
    "comparison": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "feedback": ("prompt_ids", "response_ids"),
    "prompt": ("prompt_ids",),
    "text": ("input_ids",),
}
_CHUNK = 1000  # most records of a chunk
_CHUNK_CHARACTERS = 2**22  # a chunk with so many characters is full

Chunk = list[tuple[bool, SourcedRecord]]  # (whether the record is for evaluation, record)


def features(kind: str, keeps: bool = False, margins: bool = False) -> Features:
    """The columns of prepared rows; with `keeps`, also `keeping.KEPT`; with `margins`, one for those of comparisons."""
    columns: dict[str, object] = {name: [Value("int32")] for name in _COLUMNS[kind]}
    if kind == "feedback":
        columns["desirable"] = Value("bool")
    if margins:
        columns["margin"] = Value("float32")
    kept = {KEPT: Value("string")} if keeps else {}
    return Features({**columns, "length": Value("int32"), "dialogue": Value("int64"), **kept})


def chunks(records: Iterable[tuple[bool, SourcedRecord]]) -> Iterator[Chunk]:
    """The records in order, in chunks that are large enough to be sent to another process."""
    chunk, characters = [], 0
    for item in records:
        chunk.append(item)
        characters += _characters(item[1].record) + len(item[1].kept)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Encoder:
    """Turns a chunk into (rows to train on, rows to evaluate on, what became of the records).

    Attributes:
        kind, max_tokens: see `request.DataRequest`.
        codec: turns text into ids.
        keeps: whether prompts keep columns of their rows, see `keeping`.
        margins: whether comparisons have margins.
    """

    kind: str
    max_tokens: int
    codec: Codec
    keeps: bool = False
    margins: bool = False

    def __call__(self, chunk: Chunk) -> tuple[pyarrow.Table, pyarrow.Table, PreparationReport]:
        rows: tuple[list[dict], list[dict]] = ([], [])
        report = PreparationReport()
        for is_eval, sourced in chunk:
            try:
                rows[is_eval].extend(
                    {**columns, "dialogue": sourced.dialogue} for columns in self._encoded(sourced, report)
                )
            except TemplateError as error:
                report.refuse(sourced.location, f"template {error}")
            except UserError as error:
                report.refuse(sourced.location, str(error))
        schema = features(self.kind, self.keeps, self.margins).arrow_schema
        train, held_out = (pyarrow.Table.from_pylist(side, schema) for side in rows)
        return train, held_out, report

    def _encoded(self, sourced: SourcedRecord, report: PreparationReport) -> Iterator[dict]:
        """The rows of ids of a record: one, none if it does not fit, or several pieces of a plain text."""
        codec, record = self.codec, sourced.record
        if isinstance(record, PlainText):
            ids = codec.encode_text(record.text)
            for start in range(0, len(ids), self.max_tokens):
                piece = ids[start : start + self.max_tokens]
                if len(piece) > 1:  # a single token cannot be predicted from anything
                    yield {"input_ids": piece, "length": len(piece)}
            return
        prompt = record if isinstance(record, Prompt) else record.prompt
        responses = {
            f"{name}_ids": codec.encode_response(response, prompt) for name, response in _responses(record).items()
        }
        self._note_marks(sourced, prompt, report)
        longest = max(map(len, responses.values()), default=0)
        max_prompt_tokens = self.max_tokens - longest
        if max_prompt_tokens < codec.shortest_prompt:
            report.too_long += 1
            return
        uncut = codec.encode_prompt(prompt)
        prompt_ids = codec.cut_prompt(uncut, max_prompt_tokens)
        report.prompts_cut += len(prompt_ids) < len(uncut)
        kept = {KEPT: kept_json(sourced.kept, prompt, sourced.location)} if self.keeps else {}
        said: dict[str, object] = {"desirable": record.desirable} if isinstance(record, Feedback) else {}
        if self.margins and isinstance(record, Comparison):
            said["margin"] = record.margin
        yield {"prompt_ids": prompt_ids, **responses, **said, "length": len(prompt_ids) + longest, **kept}

    def _note_marks(self, sourced: SourcedRecord, prompt: Prompt, report: PreparationReport) -> None:
        """Report text that a template has rendered already: to render it again is usually a mistake."""
        if self.codec.template.name == "none":
            return
        texts = [turn.content for response in _responses(sourced.record).values() for turn in turns_of(response)]
        for text in (*texts, *(turn.content for turn in prompt.messages)):
            if mark := next(marks(text), None):
                report.mark(sourced.location, mark)
                return


def _characters(record: Record) -> int:
    if isinstance(record, PlainText):
        return len(record.text)
    prompt = record if isinstance(record, Prompt) else record.prompt
    turns = [*prompt.messages, *(turn for response in _responses(record).values() for turn in turns_of(response))]
    return sum(len(turn.content) + len(turn.more) for turn in turns)


def _responses(record: Record) -> dict[str, Response]:
    """The responses of a record by their names."""
    if isinstance(record, Comparison):
        return {"chosen": record.chosen, "rejected": record.rejected}
    return {"response": record.response} if isinstance(record, Demonstration | Feedback) else {}
