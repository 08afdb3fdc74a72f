"""A run that is killed at any moment and started again ends as an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.checkpoints.store import PARTIAL, POINTER
from tests.launching import ROOT, deepspeed, environment, launch, run
from tests.logs import metrics

TASK = ["--data_path", "builtin:courtesy", "--data_split", "3,5,2", "--no_enable_tensorboard", "--log_interval", "1"]
GONE_WITHIN = 30  # seconds after a kill


class Victim:
    """A step whose ranks are killed, and which is started again by the same command.

    Args:
        step: name of the program's directory.
        directory: gets output/, and data/ unless the flags say otherwise.
    """

    def __init__(self, step: str, directory: Path, *flags: str, seed: int):
        self.program, self.output = ROOT / step / "main.py", directory / step
        self.flags = [*TASK, "--output_dir", str(self.output), "--data_output_path", str(directory / "data"), *flags]
        self.random, self.said = random.Random(seed), directory / f"{step}.said"
        self.in_saves = 0  # kills that met one

    def run(self, output: Path) -> None:
        """Once, to its end, into `output`."""
        launch(self.program, *self.flags, "--output_dir", str(output), ranks=2)

    def run_and_kill(self, in_save: bool, at_most: int) -> None:
        """Start it and kill one of its ranks.

        Args:
            in_save: while a save goes on, one of the next three; else at any moment of the next 20 seconds.
            at_most: steps that it may do before.
        """
        pointer = self.output / "checkpoints" / POINTER
        expected = pointer.read_text().strip() if pointer.is_file() else None
        command = [*deepspeed(2), str(self.program), *self.flags]
        with open(self.said, "w") as said:
            started = subprocess.Popen(command, env=environment(), stdout=said, stderr=said)
        try:
            while len(ranks := self.ranks(started)) < 2 and started.poll() is None:
                time.sleep(0.02)
            if in_save:
                self.wait_for_save(started)
            else:
                self.wait(started, self.random.uniform(0, 20), at_most)
            assert started.poll() is None, self.said.read_text()
            self.in_saves += any((self.output / "checkpoints").glob(f"{PARTIAL}-*"))
            self.random.choice(ranks).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            assert started.wait(timeout=GONE_WITHIN) != 0
            while left := [
                process
                for process in psutil.process_iter(["cmdline"])
                if str(self.output) in (process.info["cmdline"] or [])
            ]:
                assert time.monotonic() - killed < GONE_WITHIN, left
                time.sleep(0.1)
        finally:
            started.kill()
        self.check_start(expected)

    @staticmethod
    def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
        """Those that the launcher's own process has started."""
        try:
            return [process for middle in psutil.Process(launcher.pid).children() for process in middle.children()]
        except psutil.NoSuchProcess:
            return []

    def wait(self, started: subprocess.Popen, seconds: float, at_most: int) -> None:
        end, last = time.monotonic() + seconds, self.steps() + at_most
        while time.monotonic() < end and self.steps() < last and started.poll() is None:
            time.sleep(0.005)

    def steps(self) -> int:
        """Those that are in the metrics file, whether or not a start has gone back since."""
        path = self.output / "logs" / "metrics.jsonl"
        return path.read_text().count('"train"') if path.is_file() else 0

    def wait_for_save(self, started: subprocess.Popen) -> None:
        """Until some way into a save: one of the next three."""
        checkpoints = self.output / "checkpoints"
        left_over = set(checkpoints.glob(f"{PARTIAL}-*"))  # of the save that the last kill met
        seen = set()
        wanted = self.random.randint(1, 3)
        while len(seen) < wanted and started.poll() is None:
            seen |= set(checkpoints.glob(f"{PARTIAL}-*")) - left_over
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.03))

    def check_start(self, expected: str | None) -> None:
        """Where the run came that far, it went on from the newest checkpoint that the last one had finished."""
        lines = self.said.read_text().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert not errors or (len(errors) == 1 and "has ended without a word" in errors[0]), errors
        assert not [line for line in lines if "is not whole" in line], lines
        resumed = [line.split("/")[-1] for line in lines if line.startswith("resuming from")]
        trained = any("evaluation after 0 of" in line for line in lines)
        assert resumed in ([], [expected]) and not (expected and trained), (expected, lines)


def kill_often(victim: Victim, kills: int, undisturbed: Path) -> None:
    """So many kills, every other one in a save; the end is that of an undisturbed run."""
    victim.run(undisturbed)
    steps = metrics(undisturbed)[-1]["step"]
    for number in range(kills):
        victim.run_and_kill(in_save=number % 2 == 0, at_most=steps // (kills + 1))
    victim.run(victim.output)
    assert not (victim.output / "checkpoints").exists()
    assert metrics(victim.output) == metrics(undisturbed)
    assert victim.in_saves >= kills // 4  # a save takes milliseconds: of two kills both may miss it


def supervised(rows: int, epochs: int) -> list[str]:
    return [
        "--model_name_or_path",
        "builtin:tiny-opt",
        "--max_rows",
        str(rows),
        "--max_seq_len",
        "64",
        "--per_device_train_batch_size",
        "4",
        "--num_train_epochs",
        str(epochs),
        "--learning_rate",
        "1e-3",
        "--eval_iters",
        "2",
    ]


@pytest.mark.parametrize("kills, epochs", [(2, 4), pytest.param(20, 40, marks=pytest.mark.long)])
def test_a_killed_run_that_is_restarted_ends_with_the_same_result(kills, epochs, tmp_path):
    victim = Victim(
        "step1_sft",
        tmp_path,
        *supervised(600, epochs),
        "--save_interval",
        "2",
        "--zero_stage",
        "2",
        "--dropout",
        "0.1",
        seed=kills,
    )
    kill_often(victim, kills, tmp_path / "undisturbed")
    again = run([sys.executable, str(victim.program), *victim.flags, "--resume", str(tmp_path / "no")], check=False)
    assert again.returncode == 2 and "--resume" in again.stderr.splitlines()[-1]


@pytest.mark.long
def test_the_three_steps_killed_ten_times_reach_what_undisturbed_ones_do(tmp_path):
    """The built-in task, each step from what the killed one before it has left; the kills spread over the three."""
    ppo = [
        "--max_prompt_seq_len",
        "64",
        "--max_answer_seq_len",
        "16",
        "--per_device_generation_batch_size",
        "16",
        "--per_device_training_batch_size",
        "8",
        "--num_train_epochs",
        "3",
        "--max_rows",
        "4000",
        "--actor_zero_stage",
        "2",
        "--critic_zero_stage",
        "0",
        "--save_interval",
        "8",
        "--enable_ema",
        "--actor_learning_rate",
        "3e-4",
    ]
    steps = {"step1_sft": (supervised(4000, 4), 4), "step2_reward": (supervised(4000, 1), 3), "step3_ppo": (ppo, 3)}
    for step, (flags, kills) in steps.items():
        models = (
            [
                "--actor_model_name_or_path",
                str(tmp_path / "step1_sft"),
                "--critic_model_name_or_path",
                str(tmp_path / "step2_reward"),
            ]
            if step == "step3_ppo"
            else ["--save_interval", "10"]
        )
        victim = Victim(step, tmp_path, *flags, *models, seed=kills)
        kill_often(victim, kills, tmp_path / "undisturbed" / step)
