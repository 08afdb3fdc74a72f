"""Reads the prompts that models are to respond to, from any data source."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from common.artifacts.provenance import Provenance
from common.artifacts.split_rule import key_rule
from common.data.blend import SourceSpec, parse_data_path
from common.data.dialogues import BadRow, read_prompt
from common.data.keeping import KeptColumns
from common.data.openings import KeyRule
from common.data.options import naming_flags
from common.data.reading import ReadReport, SourcedRecord, read_records
from common.data.records import Prompt, user_turns
from common.data.split import assignment, parse_split_by
from common.errors import UserError, named_by
from inference.options import PromptOptions

_MANY = 100_000  # records, which take some seconds to read


def single_prompt(text: str, flag: str) -> Prompt:
    """A prompt from one text: a question, or a transcript with "Human:" and "Assistant:" cues."""
    try:
        return read_prompt(text, flag)
    except BadRow as error:
        raise UserError(f"no prompt: {error}") from None


@dataclass(frozen=True)
class PromptOfRow(Prompt):
    """A prompt with what rewards are to know of its row. The same question with other columns is another prompt.

    Attributes:
        columns: the kept columns of the row, a JSON object.
        location: where the row stands in the data, as file:line. Comparing prompts ignores it.
    """

    columns: str = "{}"
    location: str = field(default="", compare=False)


def read_prompts(options: PromptOptions, keep: KeptColumns | None = None) -> Iterator[Prompt]:
    """The prompts of all rows, in the order of the data, one at a time.

    Args:
        keep: the columns to keep of their rows; each is then a `PromptOfRow`.

    Raises:
        UserError: after the last one, if too many rows were bad.
    """
    for number, (_, prompt) in enumerate(_read(options, keep=keep)):
        if number == options.max_prompts:
            return
        yield prompt


def held_out_prompts(
    options: PromptOptions, trained: Sequence[Provenance], seed: int, keep: KeptColumns | None = None
) -> list[Prompt]:
    """Prompts that no model was trained on, by the split rules of the models' training; each once.

    Args:
        trained: the provenance of each model that has one. Without any, only the data's own test splits are held out.
        seed: of the choice, if there are more than `max_prompts`.
        keep: as of `read_prompts`.

    Raises:
        UserError: there is no such prompt.
    """
    prompts: dict[Prompt, None] = {}
    rules = {spec.name: [key_rule(model, spec.name) for model in trained] for spec in _sources(options)}
    for number, (sourced, prompt) in enumerate(_read(options, rules, keep)):
        if number == _MANY and options.max_rows is None:
            print(
                "note: --data_path is large, and all of it is read to find what was held out; --max_rows N reads N "
                "rows of each source",
                file=sys.stderr,
                flush=True,
            )
        if _is_held_out(sourced, prompt, trained, rules[sourced.source]):
            prompts[prompt] = None
    if not prompts:
        raise UserError(
            "--data_path holds no prompt that was kept from training: pass --which_prompts all, "
            "or data with a test split"
        )
    return choose(list(prompts), options.max_prompts, seed)


def choose(prompts: list[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """At most `count` prompts, drawn at random, because the first ones of many data sets are all of one kind."""
    if count is None or count >= len(prompts):
        return prompts
    return random.Random(seed).sample(prompts, count)


def _is_held_out(
    sourced: SourcedRecord, prompt: Prompt, trained: Sequence[Provenance], rules: Sequence[KeyRule]
) -> bool:
    if sourced.split == "test":
        return True
    turns = user_turns(prompt)
    keys = [rule.key(turns).text if parse_split_by(rule.split_by) is None else sourced.split_key for rule in rules]
    return bool(trained) and all(
        assignment(key, model.data_split, model.eval_fraction).is_eval for key, model in zip(keys, trained)
    )


def _read(
    options: PromptOptions, rules: Mapping[str, Sequence[KeyRule]] | None = None, keep: KeptColumns | None = None
) -> Iterator[tuple[SourcedRecord, Prompt]]:
    """All rows and their prompts. Their keys are those of the finest of the rules, by which most rows differ."""
    ways = {rule.split_by for of_source in (rules or {}).values() for rule in of_source}
    columns = {way for way in ways if parse_split_by(way) is not None}
    if len(columns) > 1:
        raise UserError(
            f"--path: the models were trained with --split_by {' and '.join(sorted(columns))}, so no "
            "prompt is known to be held out of both: compare models that were split alike"
        )
    split_by = next((way for way in (*columns, "prompt", "auto") if way in ways), "opening")
    shared = {name: set().union(*(rule.shared for rule in of_source)) for name, of_source in (rules or {}).items()}
    report = ReadReport()
    with naming_flags():
        records = read_records(
            _sources(options),
            "prompt",
            columns=options.columns or None,
            max_rows=options.max_rows,
            report=report,
            split_by=split_by,
            shared=shared,
            keep=keep,
        )
        for sourced in records:
            prompt = sourced.record
            assert isinstance(prompt, Prompt)  # the kind that was asked for
            if keep is not None:
                said = prompt.messages, prompt.user_messages, prompt.tools
                prompt = PromptOfRow(*said, sourced.kept, sourced.location)
            yield sourced, prompt
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        report.check(options.max_bad_rows)


def _sources(options: PromptOptions) -> list[SourceSpec]:
    form = options.file_format()
    with named_by("--data_path"):
        return parse_data_path(options.data_path, form=form)
