"""A run of two ranks whose logs are deleted, and whose output directory is moved away."""

import json
import shutil
import subprocess
import time
from pathlib import Path

from tests.launching import ROOT, deepspeed, environment, small_run


def test_a_run_goes_on_without_its_logs_and_ends_without_its_output_directory(tmp_path):
    output, said = tmp_path / "sft", tmp_path / "said"
    command = [
        *deepspeed(2, "-q"),
        str(ROOT / "step1_sft" / "main.py"),
        *small_run(tmp_path),
        *"--max_rows 400 --max_seq_len 64 --eval_iters 1 --per_device_train_batch_size 4".split(),
        *"--log_interval 1 --num_train_epochs 10000 --save_interval 5".split(),
    ]
    with open(said, "w") as file:
        started = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
        wait_for(lambda: (output / "checkpoints" / "step-5").is_dir(), started, said)
        shutil.rmtree(output / "logs")
        wait_for(lambda: len(steps(output)) > 10, started, said)
        made = steps(output)
        assert made == list(range(1, len(made) + 1)), "none is lost"
        output.rename(tmp_path / "moved")
        assert started.wait(timeout=60) == 1
    finally:
        started.kill()
    lines = [line for line in said.read_text().replace("\r", "\n").splitlines() if line.strip()]
    again = "logs/metrics.jsonl was deleted or replaced under the run: it is made again"
    assert sum(again in line for line in lines) == 1
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == (
        f"error: --output_dir {output} has been moved to {tmp_path}/moved under the run, whose "
        f"checkpoints were in {output}/checkpoints: move it back, and the same command goes on from the "
        "newest"
    )
    assert "Traceback" not in said.read_text() and not output.exists()


def wait_for(condition, started: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert started.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def steps(output: Path) -> list[int]:
    path = output / "logs" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [row["step"] for line in lines if line.endswith("\n") and (row := json.loads(line))["phase"] == "train"]
