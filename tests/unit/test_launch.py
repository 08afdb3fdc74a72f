"""Recipes, scripts and pinned versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from alternatives.dpo.config import DPOConfig
from common.config.parser import Config, parse
from common.paths import ROOT
from launch import check_flags
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.launching import environment

RECIPES = sorted((ROOT / "launch/recipes").rglob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci/run"])
PROGRAMS = sorted(
    [*ROOT.glob("step*/main.py"), *(path for path in ROOT.glob("inference/*.py") if "__main__" in path.read_text())]
)
CONFIGS: dict[str, type[Config]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
PROGRAM_CONFIGS = {**CONFIGS, "dpo": DPOConfig}  # by the names of recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "launch/recipes")))
def test_a_recipe_sets_what_it_says_and_nothing_without_effect(path, tmp_path, monkeypatch):
    for made in ("output/sft", "output/reward"):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = parse(PROGRAM_CONFIGS[path.stem.split("_")[0]], ["--config", str(path)])
    assert config.notes == ()
    for name, value in yaml.safe_load(path.read_text()).items():
        held = getattr(config, name)
        assert held == (
            type(held)(value)
            if isinstance(held, float)
            else tuple([value] if isinstance(value, str) else value)
            if isinstance(held, tuple)
            else value
        )


@pytest.mark.parametrize("directory", ["quickstart", "1gpu", "8xa100"])
def test_the_steps_of_a_recipe_set_fit_together(directory):
    sft, reward, ppo = (
        yaml.safe_load((ROOT / f"launch/recipes/{directory}/{step}.yaml").read_text()) for step in CONFIGS
    )
    for key in ("data_split", "template", "eval_fraction"):
        assert sft.get(key) == reward.get(key) == ppo.get(key)


@pytest.mark.parametrize("directory", ["1gpu", "8xa100"])
def test_the_recipe_of_dpo_goes_on_from_step_1_and_makes_the_same_steps_everywhere(directory):
    sft, dpo = (
        yaml.safe_load((ROOT / f"launch/recipes/{directory}/{name}.yaml").read_text()) for name in ("sft", "dpo")
    )
    assert dpo["model_name_or_path"] == sft["output_dir"]
    for key in ("data_split", "template", "eval_fraction"):
        assert sft.get(key) == dpo.get(key)
    gpus = {"1gpu": 1, "8xa100": 8}[directory]
    assert gpus * dpo["per_device_train_batch_size"] * dpo["gradient_accumulation_steps"] == 64


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_step_script_names_a_program_and_a_recipe_that_exist():
    scripts = [path for path in SCRIPTS if 'run_step.sh"' in path.read_text()]
    assert len(scripts) == 8
    for path in scripts:
        words = path.read_text().splitlines()[-1].split()
        program, recipe = words[words.index('"$@"') - 3 :][:2]
        assert (ROOT / program / "main.py").is_file() and (ROOT / "launch/recipes" / recipe).is_file()


def test_every_requirement_is_pinned_within_its_bounds():
    pins = {requirement.name: requirement for requirement in map(Requirement, _lines(ROOT / "constraints.txt"))}
    wanted = [
        *PROJECT["dependencies"],
        *(item for extra in PROJECT["optional-dependencies"].values() for item in extra),
    ]
    for requirement in map(Requirement, wanted):
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier
    assert next(iter(pins)) == "torch"


def test_what_the_programs_need_is_not_listed_as_needed_by_the_tests_alone():
    sections = dict(re.findall(r"^# (.*)\n((?:[^#\n].*\n)+)", (ROOT / "constraints.txt").read_text(), re.M))
    listed, for_tests, where_asked = (
        {Requirement(line).name for line in sections[title].splitlines()}
        for title in ("Used directly", "Used by the tests", "Used where asked: --quantize, --report_to wandb")
    )
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", *listed}
    extras = {
        extra: {Requirement(line).name for line in lines} for extra, lines in PROJECT["optional-dependencies"].items()
    }
    assert for_tests | where_asked == extras["test"] and where_asked == extras["quantize"] | extras["wandb"]
    assert "psutil" in listed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-gpus=0"], "error: --num_gpus 0: a whole number above 0 is needed"),
        (["--num_gpus=two"], "error: --num_gpus two: a whole number above 0 is needed"),
        (["--output-dir"], "error: --output_dir needs a value"),
        (["--output_dir="], "error: --output_dir needs a value"),
        (["--price_per_hour", "$1"], "error: --price_per_hour $1: dollars are needed, such as 1.13"),
        (["--price_per_hour=nan"], "error: --price_per_hour nan: dollars are needed, such as 1.13"),
        (["--divide-batches=yes"], "error: --divide_batches takes no value"),
    ],
)
def test_the_pipeline_knows_its_flags_however_they_are_written(flags, message):
    done = subprocess.run(["bash", str(ROOT / "launch/pipeline.sh"), *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (2, [message])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ppo_flags", "--kl_coeff 0.2"], "step 3 (ppo): unknown flag --kl_coeff: did you mean --kl_coef?"),
        (["--reward_flags", "--zero_stage 7"], "step 2 (reward): --zero_stage: expected one of 0, 1, 2, 3"),
        (["--ppo_flags=--deepspeed_config none.json"], "step 3 (ppo): --deepspeed_config none.json: cannot be read"),
        (
            ["--max_seq_len", "128"],
            "step 3 (ppo): it has no flag --max_seq_len: give that in --sft_flags and --reward_flags",
        ),
        (["--num_gpu", "2"], "step 1 (sft): unknown flag --num_gpu: did you mean --num_gpus?"),
        (["--recipes", "mine", "--divide_batches"], "step 1 (sft): --config mine/sft.yaml: cannot be read"),
        (["--output_dir", "/proc/mine"], "step 1 (sft): --output_dir /proc/mine/sft: cannot be written to"),
    ],
)
def test_the_pipeline_refuses_any_steps_flags_before_the_first_step(flags, message, tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch/pipeline.sh"), *flags],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {message}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "step, flag, value, message",
    [
        ("reward", "--data_path", "lost.jsonl", "step 2 (reward): --data_path lost.jsonl: it does not exist"),
        (
            "ppo",
            "--unsupervised_dataset_name",
            "lost.csv",
            "step 3 (ppo): --unsupervised_dataset_name lost.csv: it does not exist",
        ),
        (
            "reward",
            "--model_name_or_path",
            "./lost",
            "step 2 (reward): --model_name_or_path ./lost: no such model directory",
        ),
        (
            "ppo",
            "--critic_model_name_or_path",
            "output/lost",
            "step 3 (ppo): --critic_model_name_or_path output/lost: no such model directory",
        ),
        ("ppo", "--reward", "lost.py:correct", "step 3 (ppo): --reward lost.py:correct: there is no file lost.py"),
        ("ppo", "--reward", "output/lost=2", "step 3 (ppo): --reward output/lost: no such model directory"),
        ("ppo", "--reward", "output/reward", ""),
        ("ppo", "--actor_model_name_or_path", "./x/../output/sft", ""),
    ],
)
def test_it_looks_for_what_any_step_is_to_read(step, flag, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {
        "sft": ["--data_path", "builtin:courtesy"],
        "reward": ["--data_path", "builtin:courtesy", "--model_name_or_path", "output/sft"],
        "ppo": [
            "--data_path",
            "builtin:courtesy",
            "--actor_model_name_or_path",
            "output/sft/",
            "--critic_model_name_or_path",
            "output/reward/",
        ],
    }
    for name in flags:
        flags[name] += ["--output_dir", f"output/{name}"]
    flags[step] += [flag, value]
    words = [word for name, rest in flags.items() for word in ("--", name, *rest)][1:]
    assert check_flags.main(["", *words]) == (2 if message else 0)
    assert capsys.readouterr().err.startswith(f"error: {message}" if message else "")


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_a_step_script_says_what_is_wrong_with_num_gpus(number):
    done = subprocess.run(
        ["bash", str(ROOT / "launch/sft_1gpu.sh")],
        env={**environment(), "NUM_GPUS": number},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: NUM_GPUS {number}: a whole number above 0 is needed"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_outside_the_environment_says_how_to_enter_it(program):
    # -S leaves out the installed packages.
    done = subprocess.run(
        [sys.executable, "-S", str(program), "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "source launch/environment.sh" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--recipes",
            "mine",
            "--num_gpus",
            "2",
            "--output_dir",
            "out/",
            "--sft_flags",
            "--seed 1",
            "--columns",
            "prompt=a",
            "chosen=b",
        ],
        [
            "--recipes=mine",
            "--num-gpus=2",
            "--output-dir=out",
            "--sft-flags=--seed 1",
            "--columns",
            "prompt=a",
            "chosen=b",
        ],
    ],
)
def test_the_pipeline_hands_each_step_its_flags(flags, tmp_path):
    shutil.copytree(ROOT / "launch/recipes/1gpu", tmp_path / "mine")
    env = stand_in(tmp_path, 'shift 5\necho "$*"\nexit 3')  # says what it was started with, and fails
    done = subprocess.run(
        ["bash", str(ROOT / "launch/pipeline.sh"), *flags], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1].split("main.py ")[-1] == (
        "--config mine/sft.yaml --output_dir out/sft --data_output_path out/data --seed 1 --columns prompt=a chosen=b"
    )


def test_home_in_the_pipelines_flags(tmp_path):
    shutil.copytree(ROOT / "launch/recipes/1gpu", tmp_path / "home" / "mine")
    env = {**stand_in(tmp_path, 'shift 5\necho "$*"\nexit 3'), "HOME": str(tmp_path / "home"), "SUB": "deep"}
    done = subprocess.run(
        ["bash", str(ROOT / "launch/pipeline.sh"), "--recipes=~/mine", "--output_dir", "~/$SUB/"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    home = tmp_path / "home"
    assert done.stdout.splitlines()[-1].split("main.py ")[-1] == (
        f"--config {home}/mine/sft.yaml --output_dir {home}/deep/sft --data_output_path {home}/deep/data"
    )
    refused = subprocess.run(
        ["bash", str(ROOT / "launch/pipeline.sh"), "--output_dir", "$NOT_SET/x"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --output_dir: '$NOT_SET/x': the environment variable NOT_SET is not set, or empty: set it, or write "
        "the path out\n",
    )
    summed = subprocess.run(
        [sys.executable, str(ROOT / "launch/summary.py"), "~/lost"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert summed.returncode == 2 and f"{home}/lost" in summed.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "gpus, asked, accelerator, wait",
    [
        (True, "", "unset", "unset"),
        (False, "", "cpu", "passive"),
        (True, "cpu", "cpu", "passive"),
        (False, "cuda", "cuda", "unset"),
    ],
)
def test_a_script_asks_torch_for_gpus(gpus, asked, accelerator, wait, tmp_path):
    """Not nvidia-smi, which this PATH has only where there are none."""
    env = stand_in(tmp_path, 'echo "${DS_ACCELERATOR:-unset} ${OMP_WAIT_POLICY:-unset}"')
    (tmp_path / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {gpus}\n")
    if not gpus:
        (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    env = {name: value for name, value in env.items() if name not in ("DS_ACCELERATOR", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        ["bash", str(ROOT / "launch/sft_1gpu.sh")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(tmp_path), **({"DS_ACCELERATOR": asked} if asked else {})},
    )
    assert (done.stdout, done.stderr) == (f"{accelerator} {wait}\n", "")


def stand_in(directory: Path, script: str) -> dict[str, str]:
    """An environment in which `deepspeed` is this shell script."""
    program = directory / "deepspeed"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{environment()['PATH']}"}


@pytest.mark.parametrize("flags", [["--help"], ["--num_gpus=2", "-h"]])
def test_help_installs_nothing(flags, tmp_path):
    env = {**os.environ, "RLHF_VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"}
    done = subprocess.run(["bash", str(ROOT / "launch/quickstart.sh"), *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "--price_per_hour" in done.stdout
    assert not any(tmp_path.iterdir())


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
