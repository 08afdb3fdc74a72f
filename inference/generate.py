"""Answers to many prompts: `python inference/generate.py --path DIR --data_path FILE --output_file ANSWERS`.

Each line is a JSON object with `prompt` (the question; of a longer dialogue its messages) and `response`: a
demonstration that the training steps can read.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

import torch

from common.config.parser import PathName, option
from common.data.records import Prompt
from common.errors import TrainingFailure, UserError
from common.runtime.program import run_program
from common.runtime.streams import until_reader_leaves
from common.runtime.terminal import escape_controls_json
from inference.decoding import answer_prompts
from inference.loading import Loaded, load_speaker
from inference.options import MODEL, DecodingOptions, LoadOptions, PromptOptions, read_options
from inference.prompts import read_prompts, single_prompt

# Prompts are sorted by length among so many batches; more would keep the first answers waiting.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DecodingOptions, PromptOptions, LoadOptions):
    """Generation"""

    path: PathName = option("output/ppo", MODEL)
    prompt: str | None = option(None, "one question, in the place of --data_path")
    output_file: PathName | None = option(None, "JSON lines of the answers; none: standard output")
    max_new_tokens: int = option(128, "longest answer", unit="tokens", low=1)

    def validate(self) -> None:
        super().validate()
        if bool(self.prompt) == bool(self.data_path):
            raise UserError("give either --data_path, where the prompts are, or one --prompt")


def main(argv=None) -> None:
    """Parse, load, answer every prompt in the order of the data."""
    config = read_options(GenerateConfig, argv, prog="inference/generate.py")
    prompts = iter([single_prompt(config.prompt, "--prompt")]) if config.prompt else read_prompts(config)
    first = list(islice(prompts, 1))  # before the model is loaded, so that errors in the data come at once
    with open_output(config.output_file) as write:
        speaker = load_speaker(config.path, "--path", config)
        torch.manual_seed(config.seed)
        for row in answered(speaker, chain(first, prompts), config):
            write(escape_controls_json(json.dumps(row, ensure_ascii=False)) + "\n")


def answered(speaker: Loaded, prompts: Iterable[Prompt], config: GenerateConfig) -> Iterator[dict]:
    """Rows of prompt and response; no more than a few batches of prompts are kept in memory."""
    prompts = iter(prompts)
    while chunk := list(islice(prompts, config.batch_size * _BATCHES_SORTED_TOGETHER)):
        for prompt, answer in zip(chunk, answer_prompts(speaker, chunk, config, config.batch_size)):
            yield {"prompt": plain(prompt), "response": answer.text}


def plain(prompt: Prompt) -> str | list[dict[str, str]]:
    """A lone question as text, a dialogue as its messages."""
    if len(prompt.messages) == 1:
        return prompt.first_user_turn
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[Callable[[str], None]]:
    """What writes text, in UTF-8 and at once, to a file; to standard output if none is named.

    Raises:
        UserError: the file cannot be opened.
        TrainingFailure: there is no room for what is written.
    """
    if path is None:
        with until_reader_leaves():
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


if __name__ == "__main__":
    sys.exit(run_program(main))
