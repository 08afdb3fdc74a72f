"""Step 3 on rewards of every kind. Run under the launcher: reward_cases.py INPUTS URL OUTPUT_DIR

Each case is a run in OUTPUT_DIR/RANKS/CASE; `refused: CASE: MESSAGE` is printed for one that ends with an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil

from common.errors import UserError
from common.runtime.distributed import say, world_size
from common.runtime.program import run_program
from step3_ppo.main import main as step3
from tests.distributed.variants import DEEPSPEED, FUNCTIONS

_EVERY = (
    f"--reward {FUNCTIONS}:length=0.1 {FUNCTIONS}:overlap {{url}}=0.5 {{inputs}}/encoder=2 {{inputs}}/decoder "
    "{inputs}/same --reward_workers 1"
)
_STAGE_3 = "--actor_zero_stage 3 --critic_zero_stage 3"
# Name: flags. The last ends with an error.
CASES = {
    "default": "--critic_model_name_or_path {inputs}/same",
    "named": "--reward {inputs}/same",
    "every-zero2": f"{_EVERY} --score_calibration running",
    "every-zero3": f"{_EVERY} {_STAGE_3} --score_calibration running --offload_reward_model",
    "lora-zero3": f"--reward {{inputs}}/same {{inputs}}/encoder {_STAGE_3} --actor_lora_dim 4 --critic_lora_dim 4",
    "critic-free": f"--reward {FUNCTIONS}:overlap --advantage rloo --answers_per_prompt 2 --score_calibration rollout",
    "zero": f"--reward {FUNCTIONS}:picky {{inputs}}/same --reward_errors zero",
    "stop": f"--reward {FUNCTIONS}:picky",
}


def main() -> None:
    inputs, url, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    place = Path(output) / str(world_size())
    for name, flags in CASES.items():
        words = flags.format(inputs=inputs, url=url).split()
        try:
            step3([*common(inputs, place), *words, "--output_dir", str(place / name)])
        except UserError as failure:
            say(f"refused: {name}: {failure}")
        left = [child for child in psutil.Process().children() if "common.rewards.worker" in child.cmdline()]
        assert not left, f"{name} has left its workers: {left}"


def common(inputs: str, place: Path) -> list[str]:
    rows = 8 // world_size()
    return [
        *("--data_path", f"{inputs}/rows.jsonl", "--data_split", "0,0,1", "--data_output_path", str(place / "data")),
        *("--actor_model_name_or_path", f"{inputs}/actor", "--deepspeed_config", DEEPSPEED, "--no_enable_tensorboard"),
        *("--per_device_generation_batch_size", str(rows), "--per_device_training_batch_size", str(rows // 2)),
        *("--max_prompt_seq_len", "32", "--max_answer_seq_len", "8", "--eval_prompts", "4", "--max_iterations", "2"),
        *("--num_warmup_steps", "0", "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3"),
    ]


if __name__ == "__main__":
    sys.exit(run_program(main))
