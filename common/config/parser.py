"""Turns options declared as dataclass fields into flags, YAML keys, help texts and a saved recipe.

A value comes from the field's default, then the recipes (`--config`), then the command line; the later wins.
Nothing here knows what an option means, and nothing here imports torch.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from common.config.option import Option, PathName, convert, convert_words, joined, kind_of, option
from common.errors import UserError, did_you_mean
from common.paths import as_typed_in_a_shell

__all__ = ["Config", "Option", "PathName", "ignored_options", "option", "options", "parse", "save_config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every group of options; the first line of a group's docstring is its title in --help."""

    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)  # worth telling the user once

    def validate(self) -> None:
        """Raise UserError for a value out of range; groups add the checks of values against each other."""
        for name, meta in options(type(self)).items():
            # Paths were expanded when they were read.
            convert(replace(meta, path=False), getattr(self, name), f"--{name}")

    def useless_options(self) -> Collection[str]:
        """Names of the options that other values leave without effect; they are not advised."""
        return ()

    def only_with(self, requirement: str, met: bool, *names: str) -> None:
        """Raise UserError when one of `names` is set (is not its default) while `requirement` is not met."""
        for name in names:
            if not met and getattr(self, name) != options(type(self))[name].default:
                raise UserError(f"--{name} works only with {requirement}: add that, or leave --{name} out")

    def not_both(self, name: str, other: str) -> None:
        """Raise UserError when two options are set (are not their defaults) of which only one can hold."""
        known = options(type(self))
        if all(getattr(self, one) != known[one].default for one in (name, other)):
            flags = " and ".join(_as_given(one, getattr(self, one)) for one in (name, other))
            raise UserError(f"{flags} contradict each other: keep one")


ConfigType = TypeVar("ConfigType", bound=Config)


def _as_given(name: str, value: Any) -> str:
    """An option with its value, as on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    if isinstance(value, float):
        return f"--{name} {value:g}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


_known: dict[type[Config], dict[str, Option]] = {}


def options(cls: type[Config]) -> dict[str, Option]:
    """Every option of `cls` by name, in the order of --help: the class's own, then those of its bases."""
    if cls not in _known:
        _known[cls] = _find_options(cls)
    return _known[cls]


def _find_options(cls: type[Config]) -> dict[str, Option]:
    # Where a class declares an option of one of its bases again, the option stays in the group of the base. A field
    # without a default, which says only that every step declares the option, makes no group.
    groups = {
        name: owner
        for owner in cls.__mro__
        for name in inspect.get_annotations(owner)
        if name in (known := getattr(owner, "__dataclass_fields__", {})) and "option" in known[name].metadata
    }
    hints = typing.get_type_hints(cls)
    declared = {item.name: item for item in fields(cls) if "option" in item.metadata}
    result = {}
    for name in (name for name in groups if name in declared):
        item = declared[name]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        title = (inspect.getdoc(groups[name]) or "").partition("\n")[0].rstrip(".")
        result[name] = replace(item.metadata["option"], name=name, default=default, group=title, **kind_of(hints[name]))
    return result


def ignored_options(cls: type[Config]) -> dict[str, str]:
    """The options accepted without effect, each with the reason."""
    return {name: meta.ignored for name, meta in options(cls).items() if meta.ignored}


def parse(cls: type[ConfigType], argv: Sequence[str] | None = None, prog: str | None = None) -> ConfigType:
    """The validated config of a command line.

    Args:
        argv: the words of the command line; None for those of this process.
        prog: the name of the program in --help, which prints and exits; None: the running file and its folder.

    Returns:
        The config. Its `notes` have a line for each option that was given twice, or without effect.

    Raises:
        UserError: an option is unknown, or its value is not allowed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    recipes, given, notes = _read_command_line(cls, words, prog or _program(Path(sys.argv[0])))
    known = options(cls)
    values: dict[str, Any] = {}
    for layer in [*(_read_recipe(cls, path) for path in recipes), given]:
        for name, setting in layer.items():
            values[name] = setting.value
            if known[name].ignored and not known[name].quiet:
                notes[name] = f"{setting.location} has no effect: {known[name].ignored}"
    config = cls(**values, notes=tuple(notes.values()))
    config.validate()
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write a recipe that `--config` reads back to an equal config; options without effect are left out."""
    values = {name: getattr(config, name) for name, meta in options(type(config)).items() if not meta.ignored}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Setting(NamedTuple):
    location: str  # as the user knows it: "--seed" or "recipe.yaml:3: seed"
    spelling: str  # the name or the alias that was used
    value: Any


def _spellings(cls: type[Config]) -> dict[str, Option]:
    return {spelling: meta for name, meta in options(cls).items() for spelling in (name, *meta.aliases)}


def _add(layer: dict[str, _Setting], name: str, setting: _Setting) -> None:
    other = layer.get(name)
    if other and other.spelling != setting.spelling and other.value != setting.value:
        raise UserError(f"{other.location} and {setting.location} name one option: keep one of them")
    layer[name] = setting


def _add_again(layer: dict[str, _Setting], meta: Option, setting: _Setting, notes: dict[str, str]) -> None:
    """As `_add`, for the command line: an option of several values takes those of every time its flag is given."""
    other = layer.get(meta.name)
    if other and meta.kind in (tuple, dict):
        try:
            setting = setting._replace(value=joined(other.value, setting.value))
        except ValueError:
            raise UserError(f"{setting.location} is given twice with different values for one name: keep one") from None
        layer[meta.name] = setting
        return
    _add(layer, meta.name, setting)
    if other and other.value != setting.value and not meta.ignored:  # a script's flag, then the user's; or a slip
        notes[meta.name] = f"{setting.location} {setting.value} takes the place of {other.location} {other.value}"


def _hint(word: str, known: Iterable[str], before: str = "") -> str:
    return did_you_mean(word, known, ": ", before) or ": --help lists what there is"


def _read_recipe(cls: type[Config], path: str) -> dict[str, _Setting]:
    path = as_typed_in_a_shell(path, "--config")
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not valid YAML: {problem or 'unreadable'}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a recipe holds lines of the form 'option: value'")
    known, seen = _spellings(cls), set()
    layer: dict[str, _Setting] = {}
    for key_node, value_node in root.value:
        key, place = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key not in known:
            raise UserError(f"{place}: unknown key {key}{_hint(key, known)}")
        if key in seen:
            raise UserError(f"{place}: {key} is given twice: keep one")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode) and len({name.value for name, _ in value_node.value}) < len(
            value_node.value
        ):
            raise UserError(f"{place}: {key}: one name is given twice: keep one")
        try:
            raw = loader.construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError):
            raise UserError(f"{place}: {key}: expected {known[key].allowed()}") from None
        value = convert(known[key], raw, f"{place}: {key}")
        _add(layer, known[key].name, _Setting(f"{place}: {key}", key, value))
    return layer


def _program(file: Path) -> str:
    """step1_sft/main.py, or the name alone of an installed command."""
    return f"{file.parent.name}/{file.name}" if file.suffix == ".py" else file.name


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        # argparse before Python 3.14 takes -1e-3 for a flag; no flag of ours begins with one dash and a number.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Collect(argparse.Action):
    """Keeps flags and words as they were written; values of flags and of recipes are converted by the same code."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        words: str | Sequence[Any] | None,
        flag: str | None = None,
    ) -> None:
        assert flag is not None  # there are no positional arguments
        namespace.given.append((flag.removeprefix("--"), [words] if isinstance(words, str) else words or []))


def _build_parser(cls: type[Config], prog: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s [--config recipe.yaml] [--option value ...]",
        description="Booleans: --flag, --no_flag, --flag true|false. "
        "The command line wins over recipes, recipes over the defaults.",
    )
    collect: dict[str, Any] = {"action": _Collect, "dest": "given", "default": argparse.SUPPRESS}
    help = "YAML recipes with lines 'option: value'; of several, the later wins"
    parser.add_argument("--config", nargs="+", metavar="FILE", help=help, **collect)
    sections: dict[str, Any] = {}
    for name, meta in options(cls).items():
        if meta.group not in sections:
            sections[meta.group] = parser.add_argument_group(meta.group)
        section = sections[meta.group]
        count = {bool: "?", tuple: "+", dict: "+"}.get(meta.kind)
        section.add_argument(f"--{name}", nargs=count, metavar=_metavar(meta), help=_help(meta), **collect)
        for alias in meta.aliases:
            section.add_argument(f"--{alias}", nargs=count, help=argparse.SUPPRESS, **collect)
        for spelling in (name, *meta.aliases) if meta.kind is bool else ():
            section.add_argument(f"--no_{spelling}", nargs=0, help=argparse.SUPPRESS, **collect)
    return parser


def _metavar(meta: Option) -> str:
    if meta.choices:
        return "{" + ",".join(map(str, meta.choices)) + "}"
    if meta.path:
        return "PATH"
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", tuple: "TEXT", dict: "NAME=VALUE"}
    return names[meta.kind]


def _help(meta: Option) -> str:
    if meta.ignored:
        return f"accepted without effect: {meta.ignored}".replace("%", "%%")
    default = " ".join(meta.default) if meta.kind is tuple else meta.default
    if meta.kind is bool:
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:g}"
    details = [meta.unit, f"default {'none' if default in (None, '', {}) else default}"]
    details += [f"also --{alias}" for alias in meta.aliases]
    return f"{meta.help} [{'; '.join(filter(None, details))}]".replace("%", "%%")


def _with_underscores(word: str) -> str:
    """--max-seq-len=5 -> --max_seq_len=5; other words stay as they are."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _read_command_line(
    cls: type[Config], argv: list[str], prog: str | None
) -> tuple[list[str], dict[str, _Setting], dict[str, str]]:
    """The recipes named, the options given, and notes on some of them by name."""
    known = _spellings(cls)
    negations = {f"no_{spelling}": spelling for spelling, meta in known.items() if meta.kind is bool}
    words = [_with_underscores(word) for word in argv]
    namespace, unknown = _build_parser(cls, prog).parse_known_args(words, argparse.Namespace(given=[]))
    for flag in (word[2:].partition("=")[0] for word in unknown if word.startswith("--")):
        raise UserError(f"unknown flag --{flag}{_hint(flag, [*known, *negations, 'config'], '--')}")
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]}: every value follows its --flag")
    recipes: list[str] = []
    layer: dict[str, _Setting] = {}
    notes: dict[str, str] = {}
    for flag, values in namespace.given:
        location = f"--{flag}"
        if flag == "config":
            recipes += values
        elif flag in negations:
            _add_again(layer, known[negations[flag]], _Setting(location, negations[flag], False), notes)
        else:
            value = convert_words(known[flag], values, location)
            _add_again(layer, known[flag], _Setting(location, flag, value), notes)
    return recipes, layer, notes
