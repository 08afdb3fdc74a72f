"""Defines the errors that end a run in one line, and the hint that some of their messages give."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Input that cannot be used: a flag, a file, a row, a model directory.

    The message is one line that names the flag, file or row and says what to do. Programs print it as
    `error: MESSAGE` and exit with code 2, without a traceback.
    """


class InputError(UserError):
    """Something that an option named cannot be used. Functions below the programs raise it without knowing the option;
    the program adds that, see `named_by`.

    Args:
        subject: what cannot be used, as the user would recognise it: a path, a name, a value.
        why: what is wrong with it, and what to do.
    """

    def __init__(self, subject: str | Path, why: str):
        super().__init__(f"{subject}: {why}")
        self.subject, self.why = str(subject), why


class ModelError(InputError):
    """A model directory or hub name that cannot be used."""


class AdapterError(ModelError):
    """A model directory with an adapter that would have to be merged first."""


class RemoteCodeError(ModelError):
    """A model or tokenizer with code of its own, which was not allowed to run."""


class DataError(InputError):
    """A data source, file or column that cannot be used."""


# What the options of the programs offer against an error.
_ADVICE: dict[type[InputError], str] = {
    AdapterError: ", or add --merge_adapter",
    RemoteCodeError: ": add --trust_remote_code",
}


@contextmanager
def named_by(flag: str, names: Mapping[str, str] | None = None, kind: type[InputError] = InputError) -> Iterator[None]:
    """Within the context an `InputError` becomes a `UserError` that begins with the flag which named its subject, and
    says which other option may help.

    Args:
        names: by a subject, what the message says in its place: for a path that the program found, the value of the
            option that led there.
        kind: the only errors that are changed.
    """
    try:
        yield
    except kind as error:
        subject = (names or {}).get(error.subject, error.subject)
        raise UserError(f"{flag} {subject}: {error.why}{_ADVICE.get(type(error), '')}") from error.__cause__


class TrainingFailure(Exception):
    """Training that cannot go on, for example because the loss is not finite.

    The message is one line that says where it happened and what to try. Programs print it and exit with code 1.
    """


class Diverged(TrainingFailure):
    """Losses, gradients or weights that are not finite, or a policy too far from the reference model.

    The weights may be lost. If there are checkpoints, the program adds the last good one to the message.
    """


class TooManySkips(Diverged):
    """So many optimizer steps in a row were skipped as end a run; `limit` is their number."""

    def __init__(self, problem: str, limit: int):
        super().__init__(f"{problem}: {limit} optimizer steps in a row are skipped: {DIVERGED}")
        self.limit = limit


class AlreadyComplete(Exception):
    """The result exists already, so there is nothing to do. Programs print the message, one line, and exit with 0."""


# The end of the message of every Diverged.
DIVERGED = "training stopped and nothing was published; lower the learning rate, or look for extreme rows in the data"


def reason_of(error: Exception) -> str:
    """The message of a library that could not load a model or a tokenizer, in one line."""
    message = str(error).strip() or type(error).__name__
    first, *others = message.splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def refuse_own_code(source: str | Path, error: Exception) -> None:
    """Raise RemoteCodeError of `source` if a library could not load it because its own code was not allowed to run."""
    if "trust_remote_code=True" in str(error):
        raise RemoteCodeError(source, "it comes with code of its own, which runs only where that is allowed") from error


def did_you_mean(word: str, known: Iterable[str], lead: str = "; ", before: str = "") -> str:
    """`; did you mean NAME?` for the known name that is most similar to `word`, or '' if none is similar.

    Args:
        lead: joins the hint to the message.
        before: goes before the name.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"{lead}did you mean {before}{near[0]}?" if near else ""
