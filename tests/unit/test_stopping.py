"""What signals do to one process, and output that nobody reads any more."""
import subprocess
import sys

import pytest

from common.stopping import STOPPED
from tests.launching import ROOT

BEGIN = """
import os, signal, sys, time
from common import stopping
stopping.ONE_SIGNAL = 0.5
stopping.catch_signals()
def send(number):
    os.kill(os.getpid(), number)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BEGIN + program], cwd=ROOT, env=environment, capture_output=True,
                          text=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_before_training_a_signal_ends_the_program_in_one_line(name):
    done = run(f"send(signal.{name}); print('still here')")
    assert (done.returncode, done.stdout) == (STOPPED, "")
    assert done.stderr.split("\n") == ["", f"stopped by {name} before training began", ""]
    assert run(f"send(signal.{name})", RANK="1").stderr == ""


def test_signals_close_together_count_as_one_and_a_later_one_ends_at_once():
    done = run("stopping.training_begins(); send(signal.SIGINT); send(signal.SIGTERM); "
               "print(stopping.told(), flush=True); time.sleep(0.6); send(signal.SIGTERM); print('still here')")
    assert (done.returncode, done.stdout) == (STOPPED, "SIGINT\n")
    assert "ended at once by a second signal, SIGTERM" in done.stderr.splitlines()[-1]


def test_a_run_outlives_what_reads_its_output(tmp_path):
    done = run("read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write)\n"
               "for _ in range(3): print('x' * 100_000, flush=True)\n"
               "print('survived', file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "survived\n")
