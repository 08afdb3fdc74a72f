"""The library names no options: only who holds a configuration, or declares options, knows what they are called."""

import ast
import importlib
import re
from collections.abc import Iterator

from common.config.parser import Config, options
from common.paths import ROOT

LIBRARY = [*ROOT.glob("common/**/*.py"), *ROOT.glob("step3_ppo/generation/*.py"), *ROOT.glob("inference/*.py")]
# Modules, and functions in others, and why they name options although nobody gave them a configuration.
EXCEPTIONS = {
    "common/errors.py": "the table of named_by, with which programs add options to errors",
    "common/data/hints.py": "notes about rows are printed, and kept with prepared data, where rows are counted",
    "common/runtime/heartbeat.py Peers.hanging_ranks": "the process ends with this line: no program adds to it",
    "common/artifacts/split_rule.py _Use.__str__": "quotes the options of an earlier step as they were given",
    "common/rewards/pool.py _Worker.receive": "the cure is another option than the one that named the reward",
    "common/rewards/service.py ServiceReward._posted": "the same",
    "common/rewards/spec.py _checked": "the same",
    "step3_ppo/generation/actor_rollouts.py ActorRollouts._why_plain": "a note, printed where it is decided",
}
Named = ast.FunctionDef | ast.ClassDef


def subclasses(parent: type) -> list[type]:
    return [kind for child in parent.__subclasses__() for kind in (child, *subclasses(child))]


for path in [*ROOT.glob("step*/config.py"), *ROOT.glob("inference/*.py")]:
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
KNOWN = {name for config in subclasses(Config) for name in options(config)}
# Names of types, and of type variables, that are configurations.
CONFIGS = {"Config", "ConfigT", "ConfigType", "ScheduleType", *(config.__name__ for config in subclasses(Config))}


def is_config(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id in CONFIGS for node in ast.walk(annotation)
    )


def takes_config(function: ast.FunctionDef) -> bool:
    arguments = function.args
    return any(is_config(argument.annotation) for argument in (*arguments.args, *arguments.kwonlyargs))


def holds_config(named: Named) -> bool:
    """Whether a function is given a configuration, or a class keeps one."""
    if isinstance(named, ast.FunctionDef):
        return takes_config(named)
    return any(
        isinstance(item, ast.AnnAssign)
        and is_config(item.annotation)
        or isinstance(item, ast.FunctionDef)
        and item.name == "__init__"
        and takes_config(item)
        for item in named.body
    )


def declares_options_or_is_a_program(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ClassDef)
        and any(is_config(base) for base in node.bases)
        or isinstance(node, ast.FunctionDef)
        and node.name == "main"
        for node in tree.body
    )


def text_of(node: ast.AST) -> str | None:
    """A string as it is written, with {} for each value in it; None for any other node."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def names_option(text: str) -> bool:
    """Whether a text names an option; in backticks it is a command, with the options of that."""
    words = re.findall(r"--(\w+|\{\})", re.sub(r"`[^`]*`", "", text))
    return any(word == "{}" or word in KNOWN for word in words)


def strings(node: ast.AST, inside: tuple[Named, ...] = ()) -> Iterator[tuple[tuple[Named, ...], str]]:
    """Every string but docstrings, with the functions and classes around it."""
    for child in ast.iter_child_nodes(node):
        if (text := text_of(child)) is not None:
            yield inside, text
        elif not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from strings(child, (*inside, child) if isinstance(child, Named) else inside)


def named_options(name: str, source: str) -> set[str]:
    """Where the module `name` names an option without a configuration: module and function."""
    tree = ast.parse(source)
    if name.startswith("common/config/") or declares_options_or_is_a_program(tree):
        return set()
    return {
        " ".join(filter(None, (name, ".".join(named.name for named in inside))))
        for inside, text in strings(tree)
        if names_option(text) and not any(map(holds_config, inside))
    }


def test_only_who_holds_a_configuration_names_options():
    modules = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in LIBRARY}
    found = {place for name, source in modules.items() for place in named_options(name, source)}
    assert {place if place in EXCEPTIONS else place.split()[0] for place in found} == set(EXCEPTIONS)


def test_a_function_without_a_configuration_that_names_an_option_is_found():
    source = (
        '"""Not --seed here."""\n'
        "def bad(size: int):\n    raise ValueError(f'{size} rows: lower --max_seq_len')\n"
        "class Bad:\n    def also(self, name):\n        return f'--{name}'\n"
        "def good(config: RunOptions):\n    return lambda: f'lower --seed {config.seed}'\n"
        "class Good:\n    def __init__(self, config: RunOptions):\n        self.text = 'lower --seed'\n"
        "def command():\n    return 'run `python x.py --seed 1`, or deepspeed with --master_port N'\n"
    )
    assert named_options("module.py", source) == {"module.py bad", "module.py Bad.also"}
