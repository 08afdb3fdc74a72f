"""Checks the flags of all three steps, and that the data and models they name exist, before the first step trains.

Otherwise a mistake in the flags of a later step would show only after hours of training.

    python launch/check_flags.py USAGE sft FLAGS... -- reward FLAGS... -- ppo FLAGS...

USAGE is the usage text of launch/pipeline.sh; its flags are among those suggested for an unknown one.
"""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import ParamSpec, TypeVar

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.config.parser import options, parse
from common.errors import UserError, named_by
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

StepConfig = SFTConfig | RewardConfig | PPOConfig
CONFIGS: dict[str, type[StepConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def main(argv: Sequence[str]) -> int:
    """Check the flags. Returns the exit code: 2 after one line that names the step and the mistake."""
    usage, *words = argv
    script_flags = set(re.findall(r"--(\w+)", usage))
    try:
        steps = [(step, _read(step, flags, script_flags)) for step, *flags in _split(words)]
        # This imports torch, which is slow, so do it only after the flags are parsed.
        from common.training.engine import check_engine_options

        outputs: set[Path] = set()
        for step, config in steps:
            _for_step(step, check_engine_options, config)
            _for_step(step, _check_inputs, config, outputs)
            outputs.add(Path(config.output_dir).resolve())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _split(words: Sequence[str]) -> list[list[str]]:
    return [list(group) for mark, group in groupby(words, "--".__eq__) if not mark]


def _read(step: str, flags: Sequence[str], script_flags: set[str]) -> StepConfig:
    for word in flags:
        if word.startswith("--"):
            _for_step(step, _check_name, step, word[2:].partition("=")[0].replace("-", "_"), script_flags)
    return _for_step(step, parse, CONFIGS[step], flags, f"--{step}_flags")


def _for_step(
    step: str, function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Call the function; if it raises UserError, name the step in the message."""
    try:
        return function(*arguments, **named)
    except UserError as error:
        raise UserError(f"step {list(CONFIGS).index(step) + 1} ({step}): {error}") from None


def _check_inputs(config: StepConfig, outputs: set[Path]) -> None:
    """Raise UserError for data or a model that does not exist. `outputs`, those of earlier steps, need not exist."""
    from common.data.sources import local_source
    from common.models.checks import check_model_name

    with config.naming_flags():
        for spec in config.all_sources():
            local_source(spec)
    for name, meta in options(type(config)).items():
        model = getattr(config, name) if meta.names_model else None
        if model is not None and Path(model).resolve() not in outputs:
            with named_by(f"--{name}"):
                check_model_name(model, config.merge_adapter)
    if isinstance(config, PPOConfig):
        _check_rewards(config, outputs)


def _check_rewards(config: PPOConfig, outputs: set[Path]) -> None:
    """Raise UserError for a function or a reward model that does not exist."""
    from common.models.checks import check_model_name
    from common.rewards.opening import open_functions

    specs = config.reward_specs()
    with named_by("--reward"):
        open_functions(specs)
        for spec in specs:
            if spec.kind == "model" and Path(spec.name).resolve() not in outputs:
                check_model_name(spec.name, config.merge_adapter)


def _check_name(step: str, name: str, script_flags: set[str]) -> None:
    """Raise UserError for a flag that the step does not have; the message says which step has it."""
    step_flags = _flags(CONFIGS[step])
    if name in step_flags:
        return
    others = [f"--{other}_flags" for other, config in CONFIGS.items() if name in _flags(config)]
    if others:
        raise UserError(f"it has no flag --{name}: give that in {' and '.join(others)}")
    near = difflib.get_close_matches(name, step_flags | script_flags, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists what there is"
    raise UserError(f"unknown flag --{name}: {hint}")


def _flags(config: type[StepConfig]) -> set[str]:
    """Every flag of a program, without its dashes."""
    kinds = {spelling: meta.kind for name, meta in options(config).items() for spelling in (name, *meta.aliases)}
    return {"help", "config", *kinds, *(f"no_{spelling}" for spelling, kind in kinds.items() if kind is bool)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
