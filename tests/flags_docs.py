"""docs/flags.md, written from the declarations of the options.

python tests/flags_docs.py      writes it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alternatives.dpo.config import DPOConfig
from common.config.option import Affects, Option
from common.config.parser import Config, options
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

DOCS = ROOT / "docs/flags.md"
STEPS: dict[str, type[Config]] = {"1": SFTConfig, "2": RewardConfig, "DPO": DPOConfig, "3": PPOConfig}
COMMAND = "python tests/flags_docs.py"
CHANGE: dict[Affects, str] = {
    "result": "no",
    "evaluation": "yes; other figures of evaluations",
    "length": "yes; another end of the run",
    "nothing": "yes",
}
INTRODUCTION = f"""# Flags

All options of the training programs, one table for each group of `--help`. This page is written from the declarations
of the options: `{COMMAND}` writes it anew.

- Every flag is also a key of a recipe: `--learning_rate 1e-5` is `learning_rate: 1e-5` in a file that `--config` names.
  The command line wins over recipes, recipes over the defaults. `-` and `_` are the same in a flag.
- A flag of true or false is written `--flag`, `--no_flag` or `--flag true`. A flag of several values may be given
  several times.
- **Steps** are 1 (fine-tuning), 2 (reward model), 3 (PPO), and DPO. Where their defaults differ, each is given with its
  step.
- **Resume** says whether a run that goes on from a checkpoint may have another value than it was started with. Another
  value of a flag with "no" is refused by name; `--resume_anyway` allows it. Flags of batch sizes may also change with
  the number of ranks, if the batches of all ranks together stay as large as they were.
"""
IGNORED = """## Accepted without effect

Command lines of DeepSpeed-Chat keep their meaning. These flags of theirs are accepted and change nothing.
"""


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for group, known in _groups().items():
        rows = "\n".join(_row(name, by_step) for name, by_step in known.items())
        header = "| flag | default | unit | steps | what it does | resume |\n|---|---|---|---|---|---|"
        parts.append(f"## {group}\n\n{header}\n{rows}\n")
    rows = "\n".join(
        f"| `--{name}` | {_steps(by_step)} | {_text(_any(by_step).ignored or '')} |" for name, by_step in _ignored()
    )
    return "\n".join([*parts, f"{IGNORED}\n| flag | steps | why |\n|---|---|---|\n{rows}\n"])


ByStep = dict[str, Option]


def _by_name() -> dict[str, ByStep]:
    """For every option its declaration in each step that has it."""
    result: dict[str, ByStep] = {}
    for step, cls in STEPS.items():
        for name, meta in options(cls).items():
            result.setdefault(name, {})[step] = meta
    return result


def _groups() -> dict[str, dict[str, ByStep]]:
    """The options with an effect, by the title of their group; an option is in the group of the first step."""
    result: dict[str, dict[str, ByStep]] = {}
    for name, by_step in _by_name().items():
        with_effect = {step: meta for step, meta in by_step.items() if not meta.ignored}
        # A flag that one step declares for itself and another in a group appears with each.
        for group in dict.fromkeys(meta.group for meta in with_effect.values()):
            in_group = {step: meta for step, meta in with_effect.items() if meta.group == group}
            result.setdefault(group, {})[name] = in_group
    return result


def _ignored() -> Iterator[tuple[str, ByStep]]:
    for name, by_step in _by_name().items():
        without_effect = {step: meta for step, meta in by_step.items() if meta.ignored}
        if without_effect:
            yield name, without_effect


def _row(name: str, by_step: ByStep) -> str:
    defaults = {step: _default(meta) for step, meta in by_step.items()}
    default = (
        next(iter(defaults.values()))
        if len(set(defaults.values())) == 1
        else ", ".join(f"{value} ({step})" for step, value in defaults.items())
    )
    meta = _any(by_step)
    what = "; ".join(dict.fromkeys(other.help for other in by_step.values()))
    details = [what]
    if meta.choices:
        count = "one or more" if meta.kind is tuple else "one"
        details.append(f"{count} of " + ", ".join(f"`{choice}`" for choice in meta.choices))
    if meta.aliases:
        details.append("also " + ", ".join(f"`--{alias}`" for alias in meta.aliases))
    units = " / ".join(dict.fromkeys(other.unit for other in by_step.values() if other.unit))
    return (
        f"| `--{name}` | {default} | {units} | {_steps(by_step)} | {_text('; '.join(details))} | "
        f"{CHANGE[meta.affects]} |"
    )


def _any(by_step: ByStep) -> Option:
    return next(iter(by_step.values()))


def _steps(by_step: ByStep) -> str:
    return ", ".join(by_step)


def _default(meta: Option) -> str:
    value = meta.default
    if value in (None, "", {}, ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value)
    if isinstance(value, str):
        return f"`{value}`".replace("|", "\\|")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    DOCS.write_text(document(), encoding="utf-8")
