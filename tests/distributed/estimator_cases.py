"""Step 3 with every advantage estimator and every policy loss, in one process per rank.

Run under the launcher: estimator_cases.py MODEL REWARD_MODEL OUTPUT_DIR; writes OUTPUT_DIR/RANKS/CASE.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.runtime.distributed import world_size
from common.runtime.program import run_program
from step3_ppo.main import main as step3
from tests.distributed.variants import DEEPSPEED

# At ZeRO 2 as the papers have them.
_PUBLISHED = {
    name: f"--advantage {name}" for name in ("gae", "rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline")
}
# At ZeRO 3 with everything else.
_OTHERWISE = {
    "gae": "--gae_lambda_alpha 0.5 --critic_gae_lambda 1 --value_clip_range none --critic_zero_stage 3",
    "rloo": "--policy_loss gspo --clip_range 0.001 --clip_range_high 0.002",
    "grpo": "--policy_loss cispo --kl_estimator k3",
    "dr_grpo": "--kl_placement none",
    "reinforce++": "--clip_range_high 0.28 --dual_clip 3 --loss_aggregation sequence",
    "reinforce++_baseline": "--kl_placement none --actor_lora_dim 4 --policy_loss gspo",
}
CASES = {
    **{f"{name}-zero2": f"{flags} --actor_zero_stage 2 --critic_zero_stage 2" for name, flags in _PUBLISHED.items()},
    **{f"{name}-zero3": f"{_PUBLISHED[name]} {flags} --actor_zero_stage 3" for name, flags in _OTHERWISE.items()},
}
ITERATIONS = 2


def main() -> None:
    model, reward_model, output = (word for word in sys.argv[1:] if not word.startswith("--"))
    place = Path(output) / str(world_size())
    for name, flags in CASES.items():
        step3(
            f"--data_path builtin:courtesy --data_split 1,1,1 --max_rows 200 --dtype fp32 --no_enable_tensorboard "
            f"--actor_model_name_or_path {model} --critic_model_name_or_path {reward_model} --deepspeed_config "
            f"{DEEPSPEED} --data_output_path {place}/data --output_dir {place}/{name} --answers_per_prompt 2 "
            f"--per_device_generation_batch_size {4 // world_size()} --per_device_training_batch_size "
            f"{4 // world_size()} --max_prompt_seq_len 32 --max_answer_seq_len 8 --max_iterations {ITERATIONS} "
            f"--num_warmup_steps 0 --eval_prompts 4 --actor_learning_rate 1e-3 {flags}".split()
        )


if __name__ == "__main__":
    sys.exit(run_program(main))
