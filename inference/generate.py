"""Generates responses to many prompts: `python inference/generate.py --path DIR --data_path FILE --output_file OUT`.

Each line is a JSON object with `prompt` (the question, or the messages of a longer dialogue) and `response`. The
training steps can read it as a demonstration. With --reward it also has `score`, the weighted sum of the rewards' raw
scores, and `reward/NAME` of each. With --answers_per_prompt the answers to a prompt are lines one after another.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from this clone, even if another one is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

import torch

from common.config.parser import PathName, option
from common.data.records import Prompt
from common.errors import TrainingFailure, UserError, named_by
from common.rewards.options import NamedRewards
from common.runtime.program import run_program
from common.runtime.streams import until_reader_leaves
from common.runtime.terminal import escape_controls_json
from inference.decoding import respond_several
from inference.loading import LoadedModel, load_actor
from inference.options import MODEL, DecodingOptions, LoadOptions, PromptOptions, read_options
from inference.prompts import read_prompts, single_prompt
from inference.rewards import Rewards

# Prompts are sorted by length within so many batches. More would delay the first responses.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DecodingOptions, PromptOptions, NamedRewards, LoadOptions):
    """Generation"""

    path: PathName = option("output/ppo", MODEL)
    prompt: str | None = option(None, "one question, in the place of --data_path")
    output_file: PathName | None = option(None, "JSON lines of the answers; none: standard output")
    max_new_tokens: int = option(128, "longest answer", unit="tokens", low=1)
    answers_per_prompt: int = option(
        1, "answers to each prompt: samples, or with --num_beams the best of its beams", low=1
    )

    def validate(self) -> None:
        super().validate()
        if bool(self.prompt) == bool(self.data_path):
            raise UserError("give either --data_path, where the prompts are, or one --prompt")
        self.only_with("--reward", bool(self.reward), "keep_columns")
        if self.prompt and self.keep_columns:
            raise UserError("--keep_columns: one --prompt has no columns: give --data_path, or leave it out")
        beams, sampled = self.num_beams > 1, self.temperature > 0
        if self.answers_per_prompt > (self.num_beams if beams else self.answers_per_prompt if sampled else 1):
            raise UserError(
                f"--answers_per_prompt {self.answers_per_prompt}: "
                + (
                    f"a search with {self.num_beams} beams ends with so many answers: raise --num_beams"
                    if beams
                    else "they would all be the same: sample them with --temperature 1, or search with --num_beams "
                    f"{self.answers_per_prompt}"
                )
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, respond to every prompt in the order of the data."""
    config = read_options(GenerateConfig, argv)
    for warning in config.reward_warnings():
        print(f"warning: {warning}", file=sys.stderr)
    with contextlib.closing(Rewards(config.reward_specs(), config)) as rewards:
        prompts = _prompts(config, rewards)
        first = list(islice(prompts, 1))  # before the model is loaded, so that errors in the data come at once
        rewards.try_on(first)
        rewards.load_models(config, config.reward_batch_size)
        with open_output(config.output_file) as write:
            with named_by("--path"):
                actor = load_actor(config.path, config)
            torch.manual_seed(config.seed)
            for row in respond_in_rows(actor, chain(first, prompts), config, rewards):
                write(escape_controls_json(json.dumps(row, ensure_ascii=False)) + "\n")


def _prompts(config: GenerateConfig, rewards: Rewards) -> Iterator[Prompt]:
    if config.prompt:
        return iter([single_prompt(config.prompt, "--prompt")])
    return read_prompts(config, rewards.keep if config.reward else None)


def respond_in_rows(
    actor: LoadedModel, prompts: Iterable[Prompt], config: GenerateConfig, rewards: Rewards
) -> Iterator[dict[str, Any]]:
    """Rows of prompt, response and scores. No more than a few batches of prompts are kept in memory."""
    prompts, count = iter(prompts), config.answers_per_prompt
    while chunk := list(islice(prompts, config.batch_size * _BATCHES_SORTED_TOGETHER)):
        answers = respond_several(actor, chunk, config, config.batch_size, count)
        asked = [prompt for prompt in chunk for _ in range(count)]
        responses = [response for several in answers for response in several]
        scores = rewards.scores(asked, responses, actor.codec, config.reward_batch_size) if config.reward else {}
        totals = rewards.total(scores)
        for at, (prompt, response) in enumerate(zip(asked, responses)):
            row: dict[str, Any] = {"prompt": plain(prompt), "response": response.text}
            if scores:
                row["score"] = totals[at]
            yield row | {f"reward/{label}": numbers[at] for label, numbers in scores.items()}


def plain(prompt: Prompt) -> str | list[dict[str, str]]:
    """A single question as text, a longer dialogue as its messages."""
    if len(prompt.messages) == 1:
        return prompt.first_user_turn
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes text in UTF-8, unbuffered, to a file or, if `path` is None, to standard output.

    Raises:
        UserError: the file cannot be opened.
        TrainingFailure: the file cannot be written, because the disk is full, for example.
    """
    if path is None:
        with until_reader_leaves():
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8")
            yield lambda text: print(text, end="", flush=True)
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb", buffering=0)
    except OSError as error:
        raise UserError(f"--output_file {path}: cannot be written: {error.strerror}") from None

    def write(text: str) -> None:
        content = text.encode("utf-8")
        try:
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            raise TrainingFailure(
                f"--output_file {path}: cannot be written: {error.strerror}: free space there, or name another file"
            ) from None

    with file:
        yield write


def run() -> int:
    """The console command rlhf-generate. Returns the exit code."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
