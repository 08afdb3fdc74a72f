"""Talk to a model: `python inference/chatbot.py --path DIR`. In a pipe, one line answers one line."""

import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

import torch

from common.config.parser import PathName, option
from common.runtime.program import run_program
from common.runtime.streams import until_reader_leaves
from inference.decoding import stream_answer
from inference.dialogue import Dialogue
from inference.loading import Loaded, load_speaker
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


def main(argv=None) -> None:
    """Parse, load, talk until the input ends."""
    config = read_options(ChatConfig, argv, prog="inference/chatbot.py")
    speaker = load_speaker(config.path, "--path", config)
    dialogue = Dialogue(speaker.codec, speaker.room(config.max_new_tokens), config.system)
    torch.manual_seed(config.seed)
    terminal = Terminal()
    if terminal.interactive:
        name = speaker.codec.template.name
        terminal.notice(f"{config.path} on {speaker.device}, template {name}; /help for help")
    try:
        with until_reader_leaves():
            talk(terminal, dialogue, speaker, config)
    except KeyboardInterrupt:
        terminal.notice("")
        raise SystemExit(130) from None


def talk(terminal: Terminal, dialogue: Dialogue, speaker: Loaded, config: ChatConfig) -> None:
    """Answer questions and obey commands until there are no more."""
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
            with closing(stream_answer(speaker, prompt_ids, config)) as ids:
                dialogue.answered(show_answer(terminal, speaker.codec.stream(ids)))


def show_answer(terminal: Terminal, pieces: Iterator[str]) -> str:
    """Show an answer while it is made; what of it was shown when Ctrl-C stopped it counts as the answer."""
    shown = []
    try:
        for piece in pieces:
            shown.append(piece)
            terminal.write(piece)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        terminal.write(" [stopped]")
    terminal.end_answer()
    return "".join(shown)


if __name__ == "__main__":
    sys.exit(run_program(main))
