"""Paths as people type them, in every path option of every program and in recipes."""

from __future__ import annotations

import os
import re

import pytest
import yaml

from common.config.parser import options, parse
from step1_sft.config import SFTConfig
from tests.command_lines import PROGRAMS, Unchecked, message, read, recipe


@pytest.mark.parametrize(
    "typed, wanted",
    [
        ("~", "{home}"),
        ("~/out", "{home}/out"),
        ("~root/x", os.path.expanduser("~root/x")),
        ("$WORK/x", "/somewhere/x"),
        ("${WORK}/x", "/somewhere/x"),
        ("~/$SUB-${SUB}", "{home}/deep-deep"),
        ("a~/b", "a~/b"),
        ("./~", "./~"),
        ("price$5", "price$5"),
        ("there$NOT_SET", "there$NOT_SET"),
    ],
)
def test_home_and_variables_in_every_path_on_the_command_line_and_in_recipes(typed, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": str(tmp_path / "home"), "WORK": "/somewhere", "SUB": "deep"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "there$NOT_SET").touch()
    wanted = wanted.format(home=tmp_path / "home")
    classes = {cls.__name__: cls for cls in PROGRAMS}
    paths = {(program, name) for program, cls in classes.items() for name, meta in options(cls).items() if meta.path}
    for program, name in paths:
        cls, meta = classes[program], options(classes[program])[name]
        unchecked = type(program, (Unchecked, cls), {"__doc__": cls.__doc__})
        recipe(tmp_path / "r.yaml", yaml.safe_dump({name: typed}))
        for argv in ([f"--{name}", typed], [f"--{name}={typed}"], ["--config", "r.yaml"]):
            assert getattr(parse(unchecked, argv), name) == ((wanted,) if meta.kind is tuple else wanted)
    assert {
        ("SFTConfig", "output_dir"),
        ("PPOConfig", "resume"),
        ("RewardConfig", "deepspeed_config"),
        ("SFTConfig", "tensorboard_path"),
        ("PPOConfig", "data_output_path"),
        ("ChatConfig", "path"),
        ("EvaluateConfig", "output_file"),
        ("MergeConfig", "base"),
    } <= paths


def test_no_option_that_is_a_path_by_its_name_is_declared_as_text():
    for cls in PROGRAMS:
        for name, meta in options(cls).items():
            assert meta.path or not re.search(r"(^|_)(path|dir|file|base|deepspeed_config)$", name), name


@pytest.mark.parametrize(
    "typed, part",
    [
        ("$NOT_SET/x", "the environment variable NOT_SET is not set"),
        ("${NOT_SET}", "the environment variable NOT_SET is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is not set, or empty"),
        ("~nobody-here/x", "there is no user nobody-here: for a path of that name write ./~nobody-here"),
    ],
)
def test_a_home_or_variable_that_is_not_there_is_refused_by_flag_or_line(typed, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", "")
    for line, where in (
        (f"--output_dir '{typed}'", "--output_dir: "),
        (f"--data_path a '{typed}'", "--data_path: "),
        (f"--config '{typed}'", "--config: "),
        (recipe(tmp_path / "r.yaml", f"seed: 1\noutput_dir: {typed}\n"), "r.yaml:2: output_dir: "),
    ):
        said = message(SFTConfig, line)
        assert where in said and repr(typed) in said and part in said
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_recipe_is_found_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe(tmp_path / "mine.yaml", "seed: 5\ndata_path: [~/a.jsonl, '~/b.jsonl:0.5']\n")
    config = read(SFTConfig, "--config=~/mine.yaml")
    assert (config.seed, config.data_path) == (5, (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl:0.5"))
