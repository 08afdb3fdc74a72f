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

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch/recipes").rglob("*.yaml"))
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])
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


class TestEnvironment:
    """launch/environment.sh where it must not, or cannot, install."""

    @pytest.fixture
    def project(self, tmp_path) -> Path:
        (tmp_path / "launch").mkdir()
        shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
        for name in ("constraints.txt", "setup.py"):
            shutil.copy(ROOT / name, tmp_path)
        return tmp_path

    def source(self, project: Path, **variables: str) -> subprocess.CompletedProcess:
        env = {key: value for key, value in os.environ.items() if key not in ("RLHF_VENV", "PYTHON")}
        env.update({"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **variables})
        return subprocess.run(["bash", "-c", "source launch/environment.sh && echo ready"], cwd=project, env=env,
                              capture_output=True, text=True, timeout=120)

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
