"""The commands that an installed package brings, as pyproject.toml names them."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.paths import ROOT

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# What the script that pip installs for a command does.
START = "import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"


def start(name: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command in a directory of its own, with this clone in the place of an installed package."""
    module, _, function = COMMANDS[name].partition(":")
    return subprocess.run(
        [sys.executable, "-c", START.format(module=module, function=function, name=name), *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_help(name, tmp_path):
    result = start(name, tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    assert "--path" in result.stdout and not result.stderr


def test_a_command_returns_the_exit_code_of_its_program(tmp_path):
    result = start("rlhf-chat", tmp_path, "--path", "./nowhere")
    assert result.returncode == 2
    assert result.stderr.strip() == "error: --path ./nowhere: no such model directory"


def test_the_packages_of_all_commands_are_installed():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {target.split(".")[0] for target in COMMANDS.values()} <= set(found)
