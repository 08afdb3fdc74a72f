"""A saved config repeats its run; the options of the steps are documented and consistent."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.parser import ignored_options, option, options, parse, save_config
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from tests.command_lines import COMMAND_LINES, MODELS, STEPS, Unchecked, message, read
from tests.launching import ROOT


def values_of(meta):
    """Allowed values of an option."""
    text = st.text(
        st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="~$" if meta.path else ""), min_size=1
    ).filter(lambda value: value.strip() and value.lower() != "none")
    numbers = {
        "min_value": meta.low if meta.above is None else meta.above,
        "max_value": meta.high if meta.below is None else meta.below,
    }
    choice = st.sampled_from(meta.choices) if meta.choices else None
    values = (
        (st.lists(choice).map(tuple) if meta.kind is tuple else choice)
        if choice is not None
        else {
            bool: st.booleans(),
            int: st.integers(**numbers),
            str: text,
            float: st.floats(
                **numbers,
                exclude_min=meta.above is not None,
                exclude_max=meta.below is not None,
                allow_nan=False,
                allow_infinity=False,
            ),
            tuple: st.lists(text).map(tuple),
            dict: st.dictionaries(text, text),
        }[meta.kind]
    )
    return st.none() | values if meta.optional else values


@pytest.mark.parametrize("cls", STEPS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_saved_config_reads_back_equal(cls, data, tmp_path_factory):
    unchecked = type(cls.__name__, (Unchecked, cls), {"__doc__": cls.__doc__})
    config = unchecked(
        **{name: data.draw(values_of(meta)) for name, meta in options(unchecked).items() if not meta.ignored}
    )
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    again = parse(unchecked, ["--config", str(path)])
    assert again == config and again.notes == ()


@pytest.mark.parametrize("cls, line", COMMAND_LINES)
def test_a_run_repeats_from_its_saved_config(tmp_path, cls, line):
    config = read(cls, line)
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert read(cls, f"--config {tmp_path / 'deep' / 'config.yaml'}") == config
    assert set(yaml.safe_load((tmp_path / "deep" / "config.yaml").read_text())) == (
        set(options(cls)) - set(ignored_options(cls))
    )


@pytest.mark.parametrize("cls", STEPS)
def test_help_explains_every_option(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        read(cls, "--help")
    assert not stop.value.code
    shown = {entry.split()[0]: entry for entry in capsys.readouterr().out.split("\n  --")}
    for name, meta in options(cls).items():
        parts = [meta.ignored] if meta.ignored else [meta.help, "default", meta.unit or "", *meta.aliases]
        assert all(part in shown[name] for part in parts) and parts[0]


@pytest.mark.parametrize("cls", STEPS)
def test_options_are_consistent(cls):
    known = options(cls)
    assert set(known) == {item.name for item in dataclasses.fields(cls)} - {"notes"}
    spellings = [spelling for name, meta in known.items() for spelling in (name, *meta.aliases)]
    assert len(set(spellings)) == len(spellings)


def test_options_shared_by_steps_have_one_meaning():
    for name in set(options(SFTConfig)) & set(options(RewardConfig)):
        first, second = (dataclasses.replace(options(cls)[name], default=None, group="") for cls in STEPS[:2])
        assert first == second


def test_a_group_can_be_declared_in_a_few_lines():
    from common.config.parser import Config

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Speed(Config):
        """Speed"""

        limit: int = option(50, "not faster than this", unit="km/h", aliases=("max_speed",), low=1, high=130)

    assert parse(Speed, ["--max-speed", "80"]).limit == 80
    assert "at least 1 and at most 130" in message(Speed, "--limit 200")


def test_parsing_imports_no_torch():
    code = (
        "import sys; from common.config.parser import parse\n"
        "from step1_sft.config import SFTConfig; from step2_reward.config import RewardConfig\n"
        "from step3_ppo.config import PPOConfig\n"
        f"parse(SFTConfig, []); parse(RewardConfig, []); parse(PPOConfig, {MODELS.split()})\n"
        "print({'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
