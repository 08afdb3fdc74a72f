"""Recipes, scripts, pinned versions and the environment script."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from common.config import Config, parse
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch/recipes").rglob("*.yaml"))
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])
PROGRAMS = sorted([*ROOT.glob("step*/main.py"), *(path for path in ROOT.glob("inference/*.py")
                                                  if "__main__" in path.read_text())])
CONFIGS: dict[str, type[Config]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "launch/recipes")))
def test_a_recipe_sets_what_it_says_and_nothing_without_effect(path, tmp_path, monkeypatch):
    for made in ("output/sft", "output/reward"):
        (tmp_path / made).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = parse(CONFIGS[path.stem.split("_")[0]], ["--config", str(path)])
    assert config.notes == ()
    for name, value in yaml.safe_load(path.read_text()).items():
        held = getattr(config, name)
        assert held == (type(held)(value) if isinstance(held, float) else
                        tuple([value] if isinstance(value, str) else value) if isinstance(held, tuple) else value)


@pytest.mark.parametrize("directory", ["quickstart", "1gpu", "8xa100"])
def test_the_steps_of_a_recipe_set_fit_together(directory):
    sft, reward, ppo = (yaml.safe_load((ROOT / f"launch/recipes/{directory}/{step}.yaml").read_text())
                        for step in CONFIGS)
    for key in ("data_split", "template", "eval_fraction"):
        assert sft.get(key) == reward.get(key) == ppo.get(key)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_step_script_names_a_program_and_a_recipe_that_exist():
    scripts = [path for path in SCRIPTS if "run_step.sh\"" in path.read_text()]
    assert len(scripts) == 6
    for path in scripts:
        words = path.read_text().splitlines()[-1].split()
        program, recipe = words[words.index("\"$@\"") - 3:][:2]
        assert (ROOT / program / "main.py").is_file() and (ROOT / "launch/recipes" / recipe).is_file()


def test_every_requirement_is_pinned_within_its_bounds(monkeypatch):
    pins = {requirement.name: requirement for requirement in map(Requirement, _lines(ROOT / "constraints.txt"))}
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: told.update(arguments))
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    wanted = [*told["install_requires"], *(item for extra in told["extras_require"].values() for item in extra)]
    for requirement in map(Requirement, wanted):
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier
    assert next(iter(pins)) == "torch"


@pytest.mark.parametrize("flags, told", [
    (["--num-gpus=0"], "error: --num_gpus 0: a whole number above 0 is needed"),
    (["--num_gpus=two"], "error: --num_gpus two: a whole number above 0 is needed"),
    (["--output-dir"], "error: --output_dir needs a value"),
    (["--output_dir="], "error: --output_dir needs a value"),
    (["--price_per_hour", "$1"], "error: --price_per_hour $1: dollars are needed, such as 1.13"),
    (["--price_per_hour=nan"], "error: --price_per_hour nan: dollars are needed, such as 1.13"),
    (["--divide-batches=yes"], "error: --divide_batches takes no value")])
def test_the_pipeline_knows_its_flags_however_they_are_written(flags, told):
    done = subprocess.run(["bash", str(ROOT / "launch/pipeline.sh"), *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (2, [told])


@pytest.mark.parametrize("flags, told", [
    (["--ppo_flags", "--kl_coeff 0.2"], "step 3 (ppo): unknown flag --kl_coeff: did you mean --kl_coef?"),
    (["--reward_flags", "--zero_stage 7"], "step 2 (reward): --zero_stage: expected one of 0, 1, 2, 3"),
    (["--ppo_flags=--deepspeed_config none.json"], "step 3 (ppo): --deepspeed_config none.json: cannot be read"),
    (["--max_seq_len", "128"],
     "step 3 (ppo): it has no flag --max_seq_len: give that in --sft_flags and --reward_flags"),
    (["--num_gpu", "2"], "step 1 (sft): unknown flag --num_gpu: did you mean --num_gpus?"),
    (["--recipes", "mine", "--divide_batches"], "step 1 (sft): --config mine/sft.yaml: cannot be read"),
    (["--output_dir", "/proc/mine"], "step 1 (sft): --output_dir /proc/mine/sft: cannot be written to")])
def test_the_pipeline_refuses_any_steps_flags_before_the_first_step(flags, told, tmp_path):
    done = subprocess.run(["bash", str(ROOT / "launch/pipeline.sh"), *flags], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {told}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_a_step_script_says_what_is_wrong_with_num_gpus(number):
    done = subprocess.run(["bash", str(ROOT / "launch/sft_1gpu.sh")], env={**environment(), "NUM_GPUS": number},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: NUM_GPUS {number}: a whole number above 0 is needed"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_outside_the_environment_says_how_to_enter_it(program):
    # -S leaves out the installed packages.
    done = subprocess.run([sys.executable, "-S", str(program), "--help"], cwd=ROOT, env=environment(),
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "source launch/environment.sh" in done.stderr


@pytest.mark.parametrize("flags", [
    ["--recipes", "mine", "--num_gpus", "2", "--output_dir", "out/", "--sft_flags", "--seed 1",
     "--columns", "prompt=a", "chosen=b"],
    ["--recipes=mine", "--num-gpus=2", "--output-dir=out", "--sft-flags=--seed 1", "--columns", "prompt=a",
     "chosen=b"]])
def test_the_pipeline_hands_each_step_its_flags(flags, tmp_path):
    shutil.copytree(ROOT / "launch/recipes/1gpu", tmp_path / "mine")
    said = tmp_path / "deepspeed"  # stands for the launcher: says what it was started with, and fails
    said.write_text('#!/bin/sh\nshift 5\necho "$*"\nexit 3\n')
    said.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{environment()['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / "launch/pipeline.sh"), *flags], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1].split("main.py ")[-1] == (
        "--config mine/sft.yaml --output_dir out/sft --data_output_path out/data --seed 1 --columns prompt=a chosen=b")


@pytest.mark.parametrize("flags", [["--help"], ["--num_gpus=2", "-h"]])
def test_help_installs_nothing(flags, tmp_path):
    env = {**os.environ, "RLHF_VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"}
    done = subprocess.run(["bash", str(ROOT / "launch/quickstart.sh"), *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "--price_per_hour" in done.stdout
    assert not any(tmp_path.iterdir())


# Stands for Python and its pip where nothing can be downloaded; notes each environment it makes in $MADE.
STAND_IN = """#!/bin/sh
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$3" >> "$MADE" ;;
    pip) sleep 0.3 ;;
esac
"""


class TestEnvironment:
    """launch/environment.sh where it must not install, cannot, or is used twice at once."""

    @pytest.fixture
    def project(self, tmp_path) -> Path:
        (tmp_path / "launch").mkdir()
        shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
        for name in ("constraints.txt", "setup.py"):
            shutil.copy(ROOT / name, tmp_path)
        return tmp_path

    def start(self, project: Path, first: str = ":", **variables: str) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if key not in ("RLHF_VENV", "PYTHON")}
        env.update({"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **variables})
        return subprocess.Popen(["bash", "-c", f"{first}; source launch/environment.sh && echo ready $VIRTUAL_ENV"],
                                cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def source(self, project: Path, **variables: str) -> subprocess.CompletedProcess:
        started = self.start(project, **variables)
        stdout, stderr = started.communicate(timeout=120)
        return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)

    def test_scripts_started_together_install_once(self, project):
        stand_in = project / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        variables = {"PYTHON": str(stand_in), "MADE": str(project / "made"), "RLHF_VENV": "envs/own"}
        started = [self.start(project, **variables) for _ in range(3)]
        said = [process.communicate(timeout=120) for process in started]
        assert [stderr for _, stderr in said] == [""] * 3
        assert [stdout.splitlines()[-1] for stdout, _ in said] == [f"ready {project / 'envs/own'}"] * 3
        assert (project / "made").read_text().splitlines() == [str(project / "envs/own")]

    def test_another_shell_is_told_so(self, project):
        done = self.source(project, first="unset BASH_VERSION")
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.splitlines() == ["error: launch/environment.sh needs bash: type bash, then source it there"]

    def test_leaves_alone_what_it_did_not_make(self, project):
        (project / "mine").mkdir()
        (project / "mine/notes.txt").write_text("keep")
        done = self.source(project, RLHF_VENV=str(project / "mine"))
        assert done.returncode != 0 and "ready" not in done.stdout
        assert "was not made by launch/environment.sh" in done.stderr
        assert [path.name for path in (project / "mine").iterdir()] == ["notes.txt"]

    def test_says_which_python_it_needs(self, project):
        done = self.source(project, PYTHON="no-such-python")
        assert done.returncode != 0
        assert done.stderr.startswith("error: Python 3.11 or newer is needed; no-such-python is not")

    def test_a_failed_installation_is_not_taken_for_a_finished_one(self, project):
        for _ in range(2):
            done = self.source(project)
            assert done.returncode != 0 and "ready" not in done.stdout
            assert "the installation into" in done.stderr and "failed" in done.stderr


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
