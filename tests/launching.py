"""Run a program under the real deepspeed launcher, as a user would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.paths import ROOT


def launch(
    script: Path, *args: str, ranks: int = 1, cwd: Path = ROOT, timeout: int = 540, check: bool = True
) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus RANKS script args`; its output is shown when it fails and `check` is set."""
    return run([*deepspeed(ranks, "-q"), str(script), *args], cwd=cwd, timeout=timeout, check=check)


def deepspeed(ranks: int, *options: str, port: int | None = 0) -> list[str]:
    """The launcher's command, up to the program's name.

    Args:
        port: of the process group; 0: a free one, None: the launcher's own choice.
    """
    if port is not None:
        options = ("--master_port", str(port or free_port()), *options)
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), *options]


def launch_each(
    script: Path, *args: str, ranks: tuple[int, ...] = (1, 2), **options
) -> dict[int, subprocess.CompletedProcess]:
    """`launch` for each number of ranks, all at the same time, since each spends much of its own waiting."""
    with ThreadPoolExecutor() as pool:
        runs = {number: pool.submit(launch, script, *args, ranks=number, **options) for number in ranks}
        return {number: run.result() for number, run in runs.items()}


def run(
    command: list[str], cwd: Path = ROOT, timeout: int = 540, check: bool = True, stdin: str = ""
) -> subprocess.CompletedProcess:
    """Run a command in an environment like a user's shell, with no trace of the tests' own process."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), timeout=timeout, input=stdin, capture_output=True, text=True
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        )
    return done


def small_run(directory: Path, output: str = "sft") -> list[str]:
    """Flags of a step that trains the built-in model on the built-in task, within `directory`."""
    return [
        *("--model_name_or_path", "builtin:tiny-opt", "--data_path", "builtin:courtesy"),
        *("--output_dir", str(directory / output), "--data_output_path", str(directory / "data")),
    ]


def at_length(cases) -> list:
    """Cases for `parametrize` that are run with --long only."""
    return [pytest.param(case, marks=pytest.mark.long) for case in cases]


def environment() -> dict[str, str]:
    """A user's environment variables: the tests' own Python first on PATH, nothing of a launcher."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key
        not in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "LOCAL_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
        )
    }
    env["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait take the cores from those that work
    env["WANDB_MODE"] = "offline"
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
