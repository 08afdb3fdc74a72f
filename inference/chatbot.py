"""Runs a dialogue with a model: `python inference/chatbot.py --path DIR`. In a pipe, each input line gets one line."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from this clone, even if another one is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

import torch

from common.config.parser import PathName, option
from common.errors import named_by
from common.runtime.program import run_program
from common.runtime.streams import until_reader_leaves
from inference.decoding import stream_response
from inference.dialogue import Dialogue
from inference.loading import LoadedModel, load_actor
from inference.options import MODEL, DecodingOptions, LoadOptions, read_options
from inference.terminal import Terminal

HELP = """\
/reset  start a new dialogue
/help   show this
/quit   leave (as does the end of the input)
Ctrl-C stops an answer; at the prompt it leaves."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(DecodingOptions, LoadOptions):
    """Chat"""

    path: PathName = option("output/ppo", MODEL)
    system: str | None = option(None, "system prompt, said before every dialogue")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, respond until the input ends."""
    config = read_options(ChatConfig, argv)
    with named_by("--path"):
        actor = load_actor(config.path, config)
    with named_by("--max_new_tokens"):
        max_prompt_tokens = actor.max_prompt_tokens(config.max_new_tokens)
    dialogue = Dialogue(actor.codec, max_prompt_tokens, config.system)
    torch.manual_seed(config.seed)
    terminal = Terminal()
    if terminal.interactive:
        name = actor.codec.template.name
        terminal.notice(f"{config.path} on {actor.device}, template {name}; /help for help")
    try:
        with until_reader_leaves():
            talk(terminal, dialogue, actor, config)
    except KeyboardInterrupt:
        terminal.notice("")
        raise SystemExit(130) from None


def talk(terminal: Terminal, dialogue: Dialogue, actor: LoadedModel, config: ChatConfig) -> None:
    """Respond to questions and carry out commands until the input ends."""
    for line in terminal.questions():
        if line == "/quit":
            return
        if line == "/reset":
            dialogue.reset()
        elif line == "/help":
            terminal.notice(HELP)
        elif re.fullmatch(r"/\w+", line):
            terminal.notice(f"no command {line}; /help lists them")
        else:
            prompt_ids, notice = dialogue.ask(line)
            if notice:
                terminal.notice(f"note: {notice}")
            with closing(stream_response(actor, prompt_ids, config)) as ids:
                dialogue.add_response(show_response(terminal, actor.codec.stream(ids)))


def show_response(terminal: Terminal, pieces: Iterator[str]) -> str:
    """Show a response while it is generated, and return it. If Ctrl-C stops it, that is the part that was shown."""
    shown = []
    try:
        for piece in pieces:
            shown.append(piece)
            terminal.write(piece)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        terminal.write(" [stopped]")
    terminal.end_response()
    response = "".join(shown)
    if not response.strip():
        terminal.notice("note: the response is empty; a model that has seen only single questions may need /reset")
    return response


def run() -> int:
    """The console command rlhf-chat. Returns the exit code."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
