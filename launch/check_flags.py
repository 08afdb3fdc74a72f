"""Reads the flags of all three steps, and looks for what they name, before the first one trains: a slip must not cost
the hours before it.

    python launch/check_flags.py USAGE sft FLAGS... -- reward FLAGS... -- ppo FLAGS...

USAGE is that of launch/pipeline.sh; the flags it names are suggested too.
"""

import difflib
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.config.parser import Config, options, parse
from common.errors import UserError, named_by
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

CONFIGS: dict[str, type[Config]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def main(argv: Sequence[str]) -> int:
    """Read the flags; returns 2 after the one line that names the step and what is wrong."""
    usage, *words = argv
    own = set(re.findall(r"--(\w+)", usage))
    try:
        steps = [(step, _read(step, flags, own)) for step, *flags in _split(words)]
        # Imports torch, so not before the flags are known to be right.
        from common.training.engine import check_engine_options

        made: set[Path] = set()
        for step, config in steps:
            _for_step(step, check_engine_options, config)
            _for_step(step, _check_inputs, config, made)
            made.add(Path(config.output_dir).resolve())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _split(words: Sequence[str]) -> list[list[str]]:
    return [list(group) for mark, group in groupby(words, "--".__eq__) if not mark]


def _read(step: str, flags: Sequence[str], own: set[str]) -> Config:
    for word in flags:
        if word.startswith("--"):
            _for_step(step, _check_name, step, word[2:].partition("=")[0].replace("-", "_"), own)
    return _for_step(step, parse, CONFIGS[step], flags, f"--{step}_flags")


def _for_step(step: str, function, *arguments):
    """Calls the function; its UserError then names the step."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"step {list(CONFIGS).index(step) + 1} ({step}): {error}") from None


def _check_inputs(config: Config, made: set[Path]) -> None:
    """Raises UserError for data or a model that is not there; `made` are the models of the steps before."""
    from common.data.sources import local_source
    from common.models.checks import check_model_name

    with config.naming_flags():
        for spec in config.all_sources():
            local_source(spec)
    for name in options(type(config)):
        value = getattr(config, name)
        if name.endswith("model_name_or_path") and value is not None and Path(value).resolve() not in made:
            with named_by(f"--{name}"):
                check_model_name(value, config.merge_adapter)


def _check_name(step: str, name: str, own: set[str]) -> None:
    """Raises UserError for a flag that the step does not have; it says where the flag belongs."""
    known = _flags(CONFIGS[step])
    if name in known:
        return
    others = [f"--{other}_flags" for other, config in CONFIGS.items() if name in _flags(config)]
    if others:
        raise UserError(f"it has no flag --{name}: give that in {' and '.join(others)}")
    near = difflib.get_close_matches(name, known | own, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists what there is"
    raise UserError(f"unknown flag --{name}: {hint}")


def _flags(config: type[Config]) -> set[str]:
    """Every flag of a program, without its dashes."""
    kinds = {spelling: meta.kind for name, meta in options(config).items() for spelling in (name, *meta.aliases)}
    return {"help", "config", *kinds, *(f"no_{spelling}" for spelling, kind in kinds.items() if kind is bool)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
