"""Declares one option, and reads its value from text or YAML with one clear error.

All that the project knows about an option stands in its declaration. Code that needs it (which options may change when
a run is resumed, which of them DeepSpeed's configuration may not set, ...) asks `common.config.parser.options`.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

from common.errors import UserError
from common.paths import as_typed_in_a_shell

# A path, or a text that may be one: a name on the hub, builtin:*, a path with a weight. ~ and variables are expanded.
PathName = NewType("PathName", str)


Affects = Literal["result", "evaluation", "length", "nothing"]


class Phase:
    """The phases of a run that `Option.relieves` may name. Loops enter them under these names; messages say them."""

    TRAINING_STEP = "the training step"
    EVALUATION = "the evaluation"
    GENERATE = "generate"
    LOG_PROBS = "log_probs"
    SCORE = "score"
    ACTOR_UPDATE = "actor_update"
    CRITIC_UPDATE = "critic_update"

    OWN_UPDATE = "{prefix}update"  # of the model whose prefix a shared option has
    ANYWHERE = "anywhere"  # every phase that no option relieves by its name


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Attributes:
        help: what the option does, for --help.
        unit: of its value.
        aliases: other names of the option.
        choices: the values allowed.
        ignored: why the option has no effect. It is accepted, mentioned when given, and left out of equality and of
            saved recipes.
        quiet: do not mention an ignored option.
        low, high: the smallest and the largest value allowed.
        above, below: limits that the value itself may not take.
        affects: what another value changes, and so whether it may change when a run is resumed.
            "result": the trained weights; it may not change. "evaluation": figures that are measured beside the
            training; it may change, but a run with another value has another result. "length": at which step the run
            stops; the same. "nothing": neither.
        deepspeed_keys: keys of DeepSpeed's configuration, with dots, that the option decides. --deepspeed_config may
            not set them.
        names_model: the value is a model to start from: a directory or a name on the hub.
        relieves: phases of a run, see `Phase`, that need less memory with another value.
        advice: how to change the value for that, such as "lower {flag}".
        name, kind, path, optional, default, group: filled in from the dataclass that has the field.
    """

    help: str
    unit: str | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[Any, ...] | None = None
    ignored: str | None = None
    quiet: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    affects: Affects = "result"
    deepspeed_keys: tuple[str, ...] = ()
    names_model: bool = False
    relieves: tuple[str, ...] = ()
    advice: str = ""
    name: str = ""
    kind: type = str
    path: bool = False
    optional: bool = False
    default: Any = None
    group: str = ""

    @property
    def may_change_on_resume(self) -> bool:
        """Whether a run may go on from a checkpoint with another value than it was started with."""
        return self.affects != "result" or self.ignored is not None

    def permits(self, value: Any) -> bool:
        """Whether a value of the right type is one of the choices and inside the range."""
        if self.choices:
            return all(item in self.choices for item in (value if self.kind is tuple else (value,)))
        if self.kind not in (int, float):
            return True
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            words = f"one {'or more ' if self.kind is tuple else ''}of " + ", ".join(map(str, self.choices))
        else:
            limits = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
            bounds = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
            words = f"{_WORDS[self.kind]} {' and '.join(bounds)}".strip()
        return words + (", or none" if self.optional else "")


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] | None = None,
    ignored: str | None = None,
    quiet: bool = False,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    affects: Affects = "result",
    deepspeed_keys: Sequence[str] = (),
    names_model: bool = False,
    relieves: Sequence[str] = (),
    advice: str = "",
) -> Any:
    """A dataclass field annotated bool, int, float, str, PathName, these `| None`, tuple of texts or dict[str, str].

    The arguments are those of `Option`.
    """
    meta = Option(
        help,
        unit,
        tuple(aliases),
        None if choices is None else tuple(choices),
        ignored,
        quiet,
        low,
        high,
        above,
        below,
        affects,
        tuple(deepspeed_keys),
        names_model,
        tuple(relieves),
        advice,
    )
    return field_of(meta, default)


def field_of(meta: Option, default: Any) -> Any:
    """The dataclass field of an option."""
    metadata, compare = {"option": meta}, meta.ignored is None
    if isinstance(default, dict):
        return field(default_factory=default.copy, compare=compare, metadata=metadata)
    return field(default=default, compare=compare, metadata=metadata)


def kind_of(annotation: Any) -> dict[str, Any]:
    """`kind`, `path` and `optional` of an option by its annotation: `tuple[PathName, ...] | None` is an optional tuple
    of paths."""
    members = typing.get_args(annotation)
    optional = types.NoneType in members
    if optional:
        annotation = next(member for member in members if member is not types.NoneType)
    kind = typing.get_origin(annotation) or annotation
    return {
        "kind": str if kind is PathName else kind,
        "path": PathName in (annotation, *typing.get_args(annotation)),
        "optional": optional,
    }


def convert(meta: Option, raw: Any, location: str) -> Any:
    """The option's value from a YAML value or a text.

    Args:
        location: names the option in messages: its flag, or a line of a recipe.

    Raises:
        UserError: the value is not allowed; the message says what is.
    """
    if meta.optional and (raw is None or str(raw).lower() == "none"):
        return None
    try:
        value = _CONVERTERS[meta.kind](raw)
    except (ValueError, OverflowError):
        value = None
    if value is not None and meta.permits(value):
        return _expanded(value, location) if meta.path else value
    shown = "nothing" if raw is None else repr(raw)
    raise UserError(f"{location}: expected {meta.allowed()}, got {shown}")


def convert_words(meta: Option, words: list[str], location: str) -> Any:
    """The option's value from the words that follow its flag."""
    if meta.kind is bool and not words:
        return True
    if meta.kind is tuple:
        return convert(meta, words, location)
    if meta.kind is dict and all("=" in word for word in words):
        pairs = dict(word.split("=", 1) for word in words)
        for word in words:
            if len(several := re.split(r"[,;]\s*(?=\w+=)", word)) > 1:
                raise UserError(f"{location} {word!r}: pairs are words of their own: {location} {' '.join(several)}")
        if len(pairs) < len(set(words)):
            raise UserError(f"{location} has different values for one name: keep one")
        return convert(meta, pairs, location)
    return convert(meta, " ".join(words), location)


def joined(first: Any, second: Any) -> Any:
    """The values of an option that was given twice and takes several. Raises ValueError if a name has two values."""
    if isinstance(first, tuple):
        return first + second
    if any(first[name] != second[name] for name in first.keys() & second.keys()):
        raise ValueError
    return first | second


def _expanded(value: Any, location: str) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(as_typed_in_a_shell(item, location) for item in value)
    return as_typed_in_a_shell(value, location)


def _to_bool(raw: Any) -> bool:
    if str(raw).lower() not in ("true", "false"):
        raise ValueError
    return str(raw).lower() == "true"


def _to_int(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise ValueError
    return int(raw)


def _to_float(raw: Any) -> float:
    # Text is a number in recipes too: YAML 1.1 takes 1e-5 for text.
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)) or not math.isfinite(float(raw)):
        raise ValueError
    return float(raw)


def _to_text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError
    return raw


def _to_tuple(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, (str, list, tuple)):
        raise ValueError
    return tuple(_to_text(item) for item in ([raw] if isinstance(raw, str) else raw))


def _to_dict(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise ValueError
    return {_to_text(key): _to_text(value) for key, value in raw.items()}


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text, tuple: _to_tuple, dict: _to_dict}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "one or more values",
    dict: "name=value pairs",
}
