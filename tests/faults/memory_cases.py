"""Step 1 when the second rank has no memory left after a step. Run under the launcher, with its flags."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil
import torch

from common.runtime.distributed import rank
from common.runtime.program import run_program
from step1_sft.main import main
from step1_sft.task import SFTTask

ASKED = 2**30
loss_sum = SFTTask.loss_sum


def short_of_memory(task, engine, batch):
    if rank() == 1 and engine.training and engine.global_steps == 1:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ASKED // 2, hard))
        try:
            torch.ones(ASKED // 4)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return loss_sum(task, engine, batch)


if __name__ == "__main__":
    SFTTask.loss_sum = short_of_memory
    sys.exit(run_program(main))
