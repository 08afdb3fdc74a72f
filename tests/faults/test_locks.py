"""Two runs at once cannot share an output directory, and do not share a port."""

import contextlib
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, deepspeed, environment, small_run

PROGRAM = ROOT / "step1_sft" / "main.py"


@pytest.fixture
def run(tmp_path):
    """Starts `deepspeed` on two ranks; at the end nothing of it is left."""
    started = []

    def start(output: str, port: int | None, name: str, *flags: str) -> subprocess.Popen:
        command = [
            *deepspeed(2, port=port),
            str(PROGRAM),
            *small_run(tmp_path, output),
            *"--max_rows 400 --max_seq_len 64 --per_device_train_batch_size 4 --eval_iters 1".split(),
            *"--log_interval 1 --no_enable_tensorboard".split(),
            *flags,
        ]
        with open(tmp_path / name, "w") as said:
            started.append(subprocess.Popen(command, env=environment(), stdout=said, stderr=said))
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(launcher: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all it has started."""
    if launcher.poll() is not None:
        return
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)
    launcher.wait()


def test_a_second_run_is_refused_and_the_first_goes_on(run, tmp_path):
    output, default, taken = tmp_path / "sft", listening(29500), listening(0)
    port = taken.getsockname()[1]
    first = run("sft", None, "first", "--num_train_epochs", "10000")
    metrics = output / "logs" / "metrics.jsonl"
    while not (metrics.is_file() and '"train"' in metrics.read_text()):
        assert first.poll() is None, (tmp_path / "first").read_text()
        time.sleep(0.2)
    (rank_0,) = [
        process.pid
        for process in psutil.Process(first.pid).children(recursive=True)
        if process.environ().get("RANK") == "0"
    ]

    signal_ranks(first, signal.SIGSTOP)  # they would only take the time of the others
    same_directory, same_port = run("sft", None, "same directory"), run("other", port, "same port")
    for second, name in ((same_directory, "same directory"), (same_port, "same port")):
        assert second.wait(timeout=120) == 2, (tmp_path / name).read_text()
        assert "Traceback" not in (tmp_path / name).read_text()
    assert re.fullmatch(
        f"error: --output_dir {output}: it is in use by process {rank_0} on {socket.gethostname()} since "
        r"[-0-9]+ [:0-9]+: wait until that run has ended, or choose another directory",
        error(tmp_path / "same directory"),
    )
    assert error(tmp_path / "same port").startswith(f"error: port {port} is in use, mostly by another run")

    signal_ranks(first, signal.SIGCONT)
    size = metrics.stat().st_size
    assert first.poll() is None
    while metrics.stat().st_size == size:
        assert first.poll() is None, (tmp_path / "first").read_text()
        time.sleep(0.2)
    kill(first)
    again = run("sft", None, "again", "--enable_test_mode", "--test_stop_step", "1", "--resume", "never")
    assert again.wait(timeout=120) == 0, "the dead hold no lock: " + (tmp_path / "again").read_text()
    default.close(), taken.close()


def listening(port: int) -> socket.socket:
    """Takes a port, if nobody else has it; 29500 is the launcher's default."""
    taken = socket.socket()
    with contextlib.suppress(OSError):
        taken.bind(("", port))
        taken.listen()
    return taken


def signal_ranks(launcher: subprocess.Popen, number: signal.Signals) -> None:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if "RANK" in process.environ():
            process.send_signal(number)


def error(said: Path) -> str:
    (line,) = [line for line in said.read_text().splitlines() if line.startswith("error:")]
    return line
