"""Programs that `test_ends.py` starts under the launcher and disturbs.

end_cases.py ppo MARKS WHERE FLAGS...: step 3. WHERE is `nowhere`, or where it dwells until it is disturbed and writes
    MARKS/RANK: `rollout-N` and `update-N` of iteration N, `evaluation`.
end_cases.py steps|raises|deadlocks MARKS: a loop of barriers; rank 1 raises once MARKS/raise is there, or waits for
    ever.
end_cases.py starts MARKS: for ever in what comes before the process group.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist

from common.runtime import watchdog
from common.runtime.distributed import rank
from common.runtime.heartbeat import INTERVAL, set_phase
from common.runtime.program import launch, start
from common.runtime.signals import mark_training_started, stop_requested

TIMEOUT = 10
watchdog.GRACE = watchdog.PATIENCE = 5.0


def main() -> None:
    case, marks, *rest = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if case == "ppo":
        ppo(Path(marks), rest[0], rest[1:])
        return
    if case == "starts":
        mark(Path(marks))
        time.sleep(3600)
    start(TIMEOUT, seed=0)
    group = dist.new_group()
    mark_training_started()
    set_phase("counting")
    time.sleep(3 * INTERVAL)  # until the other rank has heard of it
    mark(Path(marks))
    while True:
        if rank() == 1 and case == "raises" and (Path(marks) / "raise").exists():
            raise ValueError("row 3 is odd")
        if rank() == 1 and case == "deadlocks":
            time.sleep(3600)
        dist.barrier(group)
        time.sleep(0.02)


def ppo(marks: Path, where: str, flags: list[str]) -> None:
    from step3_ppo import main, responder, trainer
    from step3_ppo.generation import actor_rollouts, continuous_batching

    now = ""  # where it is

    def at(name: str) -> None:
        nonlocal now
        now = name
        if now == where:
            mark(marks)

    def sample_slowly(*args):
        time.sleep(0.3 if now == where else 0)
        return sample_tokens(*args)

    def roll_out(self, prompts, sampling, iteration):
        at("evaluation" if iteration == responder.EVALUATION else f"rollout-{iteration}")
        return whole_rollout(self, prompts, sampling, iteration)

    def update(self, experience, index):
        at(f"update-{index}")
        while now == where and not stop_requested():
            time.sleep(0.05)
        return whole_update(self, experience, index)

    sample_tokens, whole_rollout = continuous_batching.sample_tokens, actor_rollouts.ActorRollouts.roll_out
    whole_update = trainer.PPOTrainer.update
    continuous_batching.sample_tokens = actor_rollouts.sample_tokens = sample_slowly
    actor_rollouts.ActorRollouts.roll_out, trainer.PPOTrainer.update = roll_out, update
    main.main(flags)


def mark(marks: Path) -> None:
    (marks / str(rank())).touch()


if __name__ == "__main__":
    launch(main)
