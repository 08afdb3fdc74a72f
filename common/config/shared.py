"""Declares options that several models or steps have once, for use by name or with a prefix in other classes.

`prefixed` gives a group all options of a class, each with a prefix before its name: --actor_zero_stage and
--critic_zero_stage are both TrainedModelOptions.zero_stage. `same_option` takes over a single one. `unprefixed` goes
the other way: it returns the values of a config as that class, with its types.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from common.config.option import Option, field_of
from common.config.parser import Config, options

ConfigType = TypeVar("ConfigType", bound=Config)


def same_option(cls: type[Config], name: str, **changes: Any) -> Any:
    """A dataclass field with the declaration of option `name` of `cls`.

    Args:
        changes: attributes of `Option` that differ from that declaration, such as `default`.
    """
    return _field(options(cls)[name], "", changes)


def prefixed(
    prefix: str, shared: type[Config], **changes: Mapping[str, Any]
) -> Callable[[type[ConfigType]], type[ConfigType]]:
    """A class decorator: the group has every option of `shared`, with `prefix` before its name, and then its own.

    Stands below `@dataclass`.

    Args:
        changes: by the name of an option without the prefix, the attributes that differ; see `same_option`.
    """

    def add_options(group: type[ConfigType]) -> type[ConfigType]:
        hints, added = typing.get_type_hints(shared), {}
        for name, meta in options(shared).items():
            setattr(group, prefix + name, _field(meta, prefix, changes.get(name, {})))
            added[prefix + name] = hints[name]
        group.__annotations__ = {**added, **inspect.get_annotations(group)}
        return group

    return add_options


def unprefixed(config: Config, shared: type[ConfigType], prefix: str = "") -> ConfigType:
    """The values that `config` has for the options of `shared`, whose names begin with `prefix` there."""
    return shared(**{name: getattr(config, prefix + name) for name in options(shared)})


def _field(meta: Option, prefix: str, changes: Mapping[str, Any]) -> Any:
    changed = replace(meta, **changes)
    phases = tuple(phase.format(prefix=prefix) for phase in changed.relieves)
    return field_of(replace(changed, relieves=phases), changed.default)
