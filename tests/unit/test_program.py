"""A file of one's own that runs the main function of a step: it starts and ends like the step's own program."""

import resource
import subprocess
import sys

import pytest

from common.runtime.signals import STOPPED
from tests.launching import ROOT, environment

EXPERIMENT = """
import os, resource, signal, sys, time
from common.errors import AlreadyComplete, TrainingFailure, UserError
from common.runtime import watchdog
from common.runtime.program import launch
from common.runtime.signals import Stopped

def main(argv=None, *, estimator=None):
    print(f"{argv} {estimator} {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}", flush=True)
    %s

launch(main, estimator="rloo")
"""


def experiment(work: str) -> subprocess.CompletedProcess:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return subprocess.run(
        [sys.executable, "-c", EXPERIMENT % work],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, limit)),
    )


@pytest.mark.parametrize(
    "work, code, error",
    [
        ("return 5", 0, ""),
        ("raise AlreadyComplete('done before')", 0, ""),
        ("raise UserError('--flag: no such file')", 2, "error: --flag: no such file\n"),
        ("raise TrainingFailure('the loss is not finite')", 1, "error: the loss is not finite\n"),
        ("raise Stopped('stopped after 3 steps')", STOPPED, ""),
        (
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)",
            STOPPED,
            "\nstopped by SIGTERM before training began\n",
        ),
    ],
    ids=["returns", "is complete", "user error", "training failure", "stopped", "signal"],
)
def test_launch_gives_a_file_of_ones_own_the_start_and_the_exit_codes_of_a_step(work, code, error):
    ended = experiment(work)
    assert (ended.returncode, ended.stderr) == (code, error)
    assert ended.stdout.splitlines()[0] == "None rloo 1024"


def test_launch_starts_the_watchdog_once():
    ended = experiment("thread = watchdog._thread; watchdog.start(); print(thread is watchdog._thread is not None)")
    assert ended.stdout.splitlines()[1:] == ["True"]
