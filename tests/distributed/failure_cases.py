"""Runs of all three programs that must fail, in one process per rank; writes down how each ended.

Run under the launcher: failure_cases.py INPUTS OUTPUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.errors import TrainingFailure
from common.runtime.distributed import gather_objects, is_main
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.distributed.option_rows import STEPS

PROGRAMS = {"sft": step1, "reward": step2, "ppo": step3}
_ONE_STEP = "--enable_test_mode --test_stop_step 1 --max_grad_norm 0 --gradient_accumulation_steps 2"
_ACTOR = "--actor_learning_rate 1e30 --max_grad_norm 0 --gradient_accumulation_steps 2"
# Name -> the step, its flags besides those of every run, and what is to be said.
CASES = {
    "sft": ("sft", f"{_ONE_STEP} --learning_rate 1e30", "evaluation after 1 of 1 steps"),
    "sft-not-evaluated": ("sft", f"{_ONE_STEP} --learning_rate 1e30 --eval_fraction 0", "trained model"),
    "sft-zero3": ("sft", f"{_ONE_STEP} --learning_rate 1e30 --eval_fraction 0 --zero_stage 3", "trained model"),
    "reward": ("reward", f"{_ONE_STEP} --learning_rate 1e30", "evaluation after 1 of 1 steps"),
    "actor": ("ppo", f"{_ONE_STEP} --actor_learning_rate 1e30", "actor's logits in the rollout of the evaluation"),
    "actor-not-evaluated": ("ppo", f"{_ONE_STEP} --actor_learning_rate 1e30 --eval_prompts 0", "trained actor"),
    "critic": ("ppo", f"{_ONE_STEP} --critic_learning_rate 1e30", "values of the evaluation"),
    "critic-not-evaluated": ("ppo", f"{_ONE_STEP} --critic_learning_rate 1e30 --eval_prompts 0", "trained critic"),
    "next-iteration": (
        "ppo",
        f"{_ACTOR} --num_train_epochs 3 --kl_controller adaptive",
        "actor's logits in the rollout of iteration 2",
    ),
    "plain-rollouts": (
        "ppo",
        f"{_ACTOR} --num_train_epochs 3 --actor_zero_stage 3 --unpin_actor_parameters",
        "actor's logits in the rollout of iteration 2",
    ),
    # Only one rank has the prompt that this actor cannot read.
    "one-rank": (
        "ppo",
        "--actor_model_name_or_path {inputs}/partly-broken --data_path {inputs}/one-odd.jsonl "
        "--eval_fraction 0 --actor_learning_rate 0",
        "actor's logits in the rollout of iteration",
    ),
}


def main() -> None:
    inputs, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    torch.set_num_threads(1)
    found = {}
    for name, (step, flags, _) in CASES.items():
        words = f"{STEPS[step].flags} --output_dir {output}/{name} --data_output_path {output}/data {flags}"
        try:
            PROGRAMS[step]([word.format(inputs=inputs) for word in words.split()])
            said = None
        except TrainingFailure as failure:
            said = str(failure)
        found[name] = {"said": gather_objects(said), "published": (Path(output) / name / "provenance.json").exists()}
    if is_main():
        (Path(output) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_program(main))
