"""The effects of signals on one process, and of a closed output."""

import subprocess
import sys
import time

import pytest

from common.runtime.signals import STOPPED
from tests.launching import ROOT

BEGIN = """
import os, signal, sys, time
from common.runtime import signals
signals.ONE_SIGNAL = 0.5
signals.catch_signals()
def send(number):
    os.kill(os.getpid(), number)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_before_training_a_signal_ends_the_program_in_one_line(name):
    done = run(f"send(signal.{name}); time.sleep(9); print('still here')")
    assert (done.returncode, done.stdout) == (STOPPED, "")
    assert done.stderr.split("\n") == ["", f"stopped by {name} before training began", ""]
    assert run(f"send(signal.{name}); time.sleep(9)", RANK="1").stderr == ""


def test_ctrl_c_is_reported_even_if_the_launcher_sends_sigterm_first():
    done = run(
        "signals.mark_training_started(); send(signal.SIGTERM); send(signal.SIGINT); time.sleep(0.4); "
        "print(signals.stop_requested())"
    )
    assert (done.returncode, done.stdout) == (0, "SIGINT\n")


def test_signals_close_together_count_as_one_and_a_later_one_ends_at_once():
    done = run(
        "signals.mark_training_started(); send(signal.SIGINT); send(signal.SIGTERM); "
        "time.sleep(0.7); print(signals.stop_requested(), flush=True); send(signal.SIGTERM); time.sleep(9); "
        "print('still here')"
    )
    assert (done.returncode, done.stdout) == (STOPPED, "SIGINT\n")
    assert "ended at once by a second signal, SIGTERM" in done.stderr.splitlines()[-1]


def test_a_signal_ends_a_rank_that_waits_for_another_in_a_library():
    """Python would run the handler after the call, and that is over when the rank that was killed has joined."""
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            BEGIN
            + (
                "from datetime import timedelta\n"
                "from torch.distributed import TCPStore\n"
                "print('now', flush=True)\n"
                "TCPStore('127.0.0.1', 0, world_size=2, is_master=True, timeout=timedelta(seconds=60))\n"
            ),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout.readline() == "now\n"
    time.sleep(0.5)  # whether it is in the call by then or not, the signal must end it
    waiting.terminate()
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == STOPPED and "stopped by SIGTERM before training began" in said


def test_a_run_outlives_what_reads_its_output(tmp_path):
    done = run(
        "read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write)\n"
        "for _ in range(3): print('x' * 100_000, flush=True)\n"
        "print('survived', file=sys.stderr)"
    )
    assert (done.returncode, done.stderr) == (0, "survived\n")
