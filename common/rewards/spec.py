"""Reads what `--reward NAME[=WEIGHT] ...` names: functions, services and reward models, each with a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import PurePath
from typing import Literal
from urllib.parse import urlsplit

from common.rewards.errors import RewardError

Kind = Literal["function", "service", "model"]
METRIC_ENDINGS = ("", "_std", "_clipped", "_failed")  # of the metrics that carry a reward's label

_SERVICE = re.compile(r"https?://", re.IGNORECASE)
_IN_FILE = re.compile(r".+\.py:[^/:]*$")
_IN_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")


@dataclass(frozen=True)
class RewardSpec:
    """One reward as the option names it.

    Attributes:
        name: without the weight: FILE.py:FUNCTION or MODULE:FUNCTION, http(s)://..., or a model's directory or hub
            name.
        weight: of its normalised score in the sum.
        label: its short name in the log, different for each reward of a run.
    """

    name: str
    weight: float = 1.0
    label: str = ""

    @property
    def kind(self) -> Kind:
        if _SERVICE.match(self.name):
            return "service"
        if self.name.startswith("builtin:"):
            return "model"
        return "function" if _IN_FILE.match(self.name) or _IN_MODULE.match(self.name) else "model"


def parse_rewards(words: Sequence[str]) -> tuple[RewardSpec, ...]:
    """The rewards that the words of the option name.

    Raises:
        RewardError: a weight is no number, a reward is named twice, a URL holds a password, or a file is named
            without a function.
    """
    specs: list[RewardSpec] = []
    for word in words:
        name, weight = _split_weight(word)
        spec = _checked(RewardSpec(name, weight))
        if any(spec.name == other.name for other in specs):
            raise RewardError(spec.name, "is named twice: keep one, with the sum of both weights")
        label, taken = _short_name(spec), {metric for other in specs for metric in _metrics(other.label)}
        numbered = (f"{label}-{number}" for number in count(2))
        free = next(label for label in chain([label], numbered) if taken.isdisjoint(_metrics(label)))
        specs.append(RewardSpec(name, weight, free))
    return tuple(specs)


def _metrics(label: str) -> list[str]:
    return [label + ending for ending in METRIC_ENDINGS]


def _split_weight(word: str) -> tuple[str, float]:
    """(name, weight): what follows the last = is the weight. In the query of a URL it is one only if it is a number."""
    name, equals, text = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if math.isfinite(weight) and weight != 0 and name:
        return name, weight
    if _SERVICE.match(word) and "?" in name and not math.isfinite(weight):
        return word, 1.0
    raise RewardError(
        _without_password(word),
        f"the weight behind = is to be a finite number other than 0, not {text!r}"
        if name
        else "there is no name before =",
    )


def _checked(spec: RewardSpec) -> RewardSpec:
    if spec.kind == "service":
        try:
            url = urlsplit(spec.name)
            host, password = url.hostname, url.username or url.password
        except ValueError:
            host, password = None, None
        if not host:
            raise RewardError(_without_password(spec.name), "is no address: write http://HOST:PORT/PATH")
        if password:
            raise RewardError(
                _without_password(spec.name),
                "has a user or a password in it, which the saved settings would show: put it into an environment "
                "variable, and name that with --reward_header_env",
            )
    elif spec.name.endswith(".py") or spec.name.endswith(".py:"):
        raise RewardError(spec.name, "is a file: name the function in it too, as in my_reward.py:correct")
    return spec


def queries(specs: Sequence[RewardSpec]) -> list[str]:
    """The addresses of services that have a query, without it: it may hold a key."""
    services = (urlsplit(spec.name) for spec in specs if spec.kind == "service")
    return [url._replace(query="...", fragment="").geturl() for url in services if url.query]


def _without_password(url: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)


def _short_name(spec: RewardSpec) -> str:
    if spec.kind == "function":
        return spec.name.rpartition(":")[2]
    if spec.kind == "service":
        return urlsplit(spec.name).hostname or spec.name
    return PurePath(spec.name).name or spec.name
