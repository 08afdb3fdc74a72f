"""If writing the samples fails, no result is published, and the checkpoints stay."""

import subprocess
import sys

import pytest

from tests.launching import ROOT, environment, small_run

PROGRAM = """
import sys
sys.path[:0] = [{root!r}]
from common.runtime import watchdog
watchdog.start()
from common.runtime.program import run_program
from {step}.main import main
from {step}.task import {task}
def fails(*args, **kwargs):
    raise ValueError("no samples")
{task}.samples = fails
sys.exit(run_program(main, sys.argv[1:]))
"""


@pytest.mark.parametrize("step, task", [("step1_sft", "SFTTask"), ("step2_reward", "RewardTask")])
def test_a_run_whose_samples_fail_has_no_result_and_keeps_its_checkpoints(step, task, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM.format(root=str(ROOT), step=step, task=task),
            *small_run(tmp_path, "out"),
            *"--max_rows 300 --max_seq_len 64 --eval_iters 1 --per_device_train_batch_size 4".split(),
            *"--save_interval 1 --enable_test_mode --test_stop_step 3 --no_enable_tensorboard".split(),
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "ValueError: no samples" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "provenance.json").exists() and "\nsaved to" not in done.stdout
    assert (tmp_path / "out" / "checkpoints" / "step-2").is_dir()
