"""Every option is read by its program, or stands in the list of those accepted without effect; none is both."""
import ast
from functools import cache

import pytest

from common.config import ignored_options, options
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.conftest import ROOT

STEPS = [(SFTConfig, "step1_sft"), (RewardConfig, "step2_reward"), (PPOConfig, "step3_ppo")]


@cache
def attributes_read(package: str) -> frozenset[str]:
    """Names read as an attribute of something called config, outside the modules that declare and check options."""
    names = set()
    for path in [*(ROOT / package).glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_config(node.value):
                names.add(node.attr)
    return frozenset(names)


def _is_config(node: ast.expr) -> bool:
    """Whether an expression is `config` or something's `.config`."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name == "config"


# Read through a property of the configuration that programs use in their place.
THROUGH_PROPERTIES = {"dropout": "dropout_probability", "disable_dropout": "dropout_probability",
                      "test_stop_step": "stop_after", "enable_test_mode": "stop_after"}


@pytest.mark.parametrize("config, package", STEPS)
def test_every_option_has_an_effect_or_says_that_it_has_none(config, package):
    read = attributes_read(package)
    ignored = set(ignored_options(config))
    unused = {name for name in options(config) if name not in ignored
              and THROUGH_PROPERTIES.get(name, name) not in read}
    assert not unused
    assert not ignored & read


def test_the_readme_lists_every_option_without_effect():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("Accepted without effect"):]
    assert {f"`--{name}`" for config, _ in STEPS for name in ignored_options(config)
            if f"`--{name}`" not in table} == set()
