"""A run that is killed goes on from its last checkpoint when the same command is given again."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.launching import ROOT, environment, free_port, launch, run


def test_the_same_command_goes_on_after_a_kill(tmp_path):
    command = ["--model_name_or_path", "builtin:tiny-opt", "--data_path", "builtin:courtesy", "--max_rows", "400",
               "--output_dir", str(tmp_path / "sft"), "--data_output_path", str(tmp_path / "data"),
               "--max_seq_len", "64", "--per_device_train_batch_size", "4", "--num_train_epochs", "4", "--save_interval", "10",
               "--log_interval", "1", "--no_enable_tensorboard"]
    program = ROOT / "step1_sft" / "main.py"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen([*launcher, str(program), *command], env=environment(), stdout=said, stderr=said)
        while not list((tmp_path / "sft" / "checkpoints").glob("step-*")):
            assert started.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        ranks = [process for process in psutil.Process(started.pid).children(recursive=True)
                 if str(program) in process.cmdline() and "deepspeed.launcher.launch" not in process.cmdline()]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        assert started.wait(timeout=60) != 0
    done = launch(program, *command, ranks=2)
    assert "resuming from" in done.stdout and (tmp_path / "sft" / "provenance.json").is_file()
    assert not (tmp_path / "sft" / "checkpoints").exists()
    again = run([sys.executable, str(program), *command, "--resume", str(tmp_path / "nowhere")], check=False)
    assert again.returncode == 2 and "--resume" in again.stderr.splitlines()[-1]
