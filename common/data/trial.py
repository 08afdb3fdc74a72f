"""Tries a tokenizer and its chat template before use: they may run for ever, recurse without end, or fill the memory.

Both are programs that come with a model's directory. Neither can be stopped from Python once it runs, so the trial is
in a forked process with limits on time and memory.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError, reason_of

SECONDS = 10  # processor time; a usual trial takes milliseconds
MEMORY = 2**30  # bytes, besides those of this process
_PATIENCE = 120  # seconds by the clock, as a busy machine may delay the trial

# Lengths of runs of one character. A pattern whose time doubles with every character never ends at the short one; one
# whose time grows with the square ends at both.
_SHORT_RUN, _LONG_RUN = 64, 2000
_ANY = "".join(map(chr, range(33, 127)))  # engines skip a pattern if a character that it needs does not occur
_PROBES = [
    character * run + end
    for character in ("a", "Z", "7", " ", "\n", "_", "!", "\u00e9", "\u4e2d", "ab ", "a-")
    for run in (_SHORT_RUN, _LONG_RUN)
    for end in ("", "\x07?", f"\x07\n{_ANY}")
]

_USER, _ASSISTANT = ({"role": role, "content": "What is it?"} for role in ("user", "assistant"))
_SYSTEM = {"role": "system", "content": "Be brief."}


def try_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Encode texts on which patterns may backtrack. A tokenizer without a pattern of its own passes.

    Args:
        name: directory or hub name, for messages.

    Raises:
        UserError: it does not end, takes too much memory or fails; names the file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "Regex(" not in f"{backend.normalizer} {backend.pre_tokenizer}":
        return

    def encode() -> None:
        for text in _PROBES:
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    if problem := _problem_in_child(encode):
        raise UserError(
            f"{_file(name, 'tokenizer.json')}: the tokenizer cannot be used: to encode a text {problem}: "
            "use the tokenizer's own files of its publisher"
        )


def try_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Render short dialogues with the chat template. A template that raises an error of its own passes.

    Raises:
        UserError: it recurses, does not end, fills the memory or fails; names the file.
    """

    def render() -> None:
        for messages in ([_USER], [_SYSTEM, _USER], [_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER]):
            for asks in (True, False):
                try:
                    tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
                except TemplateError:
                    pass

    if problem := _problem_in_child(render):
        raise UserError(
            f"{_file(name, 'chat_template.jinja', 'tokenizer_config.json')}: the chat template cannot be "
            f"used: to render a short dialogue {problem}: correct it, or choose another template"
        )


def _file(name: str, *files: str) -> Path | str:
    """The first of the files that the directory has; the name itself if it is on the hub."""
    return next((path for file in files if (path := Path(name).expanduser() / file).is_file()), name)


def _problem_in_child(work: Callable[[], None]) -> str | None:
    """What went wrong with `work` in a forked process with limits on time and memory; None if nothing did."""
    memory = psutil.Process().memory_info().vms + MEMORY
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _work(work, writing, memory)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        poll = select.poll()
        poll.register(reading, select.POLLIN | select.POLLHUP)
        if not poll.poll(_PATIENCE * 1000):
            os.kill(child, signal.SIGKILL)
        message = os.read(reading, 4096).decode()
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if message:
        return message
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM):
        return None  # it was killed from outside, which says nothing about the tokenizer
    if os.WTERMSIG(status) == signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds"
    return f"ends the program by {signal.Signals(os.WTERMSIG(status)).name}, mostly for want of memory"


def _work(work: Callable[[], None], writing: int, memory: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries in Rust print their errors there
        os.dup2(nowhere, stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(_PATIENCE)  # ends this process even if the program is killed meanwhile
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    try:
        work()
    except MemoryError:
        os.write(writing, f"takes more than {MEMORY >> 20} MiB of memory".encode())
    except RecursionError:
        os.write(writing, b"recurses without end")
    except BaseException as error:  # a panic in Rust is a BaseException
        reason = reason_of(error if isinstance(error, Exception) else Exception(str(error) or type(error).__name__))
        os.write(writing, f"fails ({type(error).__name__}: {reason[:300]})".encode())
