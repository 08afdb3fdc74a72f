"""On a machine without compiler and ninja, programs run, or say what to install."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, deepspeed, environment, small_run

COMPILERS = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|cpp|clang|clang\+\+|ninja|nvcc)(-[0-9.]+)?")


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment whose PATH has everything but compilers and ninja, and no operator that was compiled before."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for place in environment()["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            if not COMPILERS.fullmatch(program.name) and not (directory / program.name).exists():
                (directory / program.name).symlink_to(program)
    return {**environment(), "PATH": str(directory), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


def test_programs_run_without(bare, tmp_path):
    done = subprocess.run(
        [
            *deepspeed(2, "-q"),
            str(ROOT / "step1_sft" / "main.py"),
            *small_run(tmp_path),
            *"--max_rows 300 --enable_test_mode --test_stop_step 2 --zero_stage 2 --offload".split(),
        ],
        env=bare,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sft" / "provenance.json").is_file()


def test_what_must_be_compiled_says_what_to_install(bare):
    program = (
        "import torch; from common.runtime.program import prepare_environment; prepare_environment()\n"
        "from common.errors import UserError, named_by; from common.training.optim import cpu_adam\n"
        "try:\n"
        " with named_by('--offload needs'):\n"
        "  cpu_adam([{'params': [torch.nn.Parameter(torch.ones(3))], 'lr': 1e-3, 'weight_decay': 0.0}])\n"
        "except UserError as error: print('error:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**bare, "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert "--offload" in line and "ninja" in line and "apt install g++ ninja-build" in line
