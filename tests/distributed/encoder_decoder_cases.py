"""All steps with encoder-decoder models, whole, broken off after a checkpoint, and continued.

Run under the launcher: encoder_decoder_cases.py [--long] DATA MODELS OUTPUT_DIR, within OUTPUT_DIR/RANKS. Every run is
made in whole/ and in broken/, where an exception ends it after its second checkpoint, and the same command goes on with
it. A model is one of MODELS, or what a case of step 1 has made.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.runtime.distributed import world_size
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.distributed.resume_cases import breaking_off
from tests.distributed.variants import DEEPSPEED, ENCODER_DECODERS, ENCODER_DECODERS_AT_LENGTH, FUNCTIONS


def main() -> None:
    data, models, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    cases = ENCODER_DECODERS | (ENCODER_DECODERS_AT_LENGTH if "--long" in sys.argv else {})
    place = Path(output) / str(world_size())
    for name, (step, model, flags) in cases.items():
        common = [
            *("--data_path", data, "--data_output_path", str(place / "data")),
            *("--data_split", "1,1,1", "--deepspeed_config", DEEPSPEED, "--no_enable_tensorboard", *flags),
        ]
        program = {"sft": step1, "reward": step2, "ppo": step3}[step]
        start = str(place / "whole" / model) if model in cases else f"{models}/{model}"
        own = ppo(start, place / "whole") if step == "ppo" else supervised(start)

        def run(kind: str) -> None:
            program([*common, *own, "--output_dir", str(place / kind / name)])

        run("whole")
        with breaking_off():
            run("broken")
        run("broken")


def supervised(model: str) -> list[str]:
    return [
        *("--model_name_or_path", model, "--max_seq_len", "48", "--learning_rate", "2e-3"),
        *("--per_device_train_batch_size", str(4 // world_size()), "--gradient_accumulation_steps", "2"),
        *("--save_interval", "2", "--log_interval", "1", "--num_train_epochs", "2"),
        *("--disable_dropout", "--adam_epsilon", "1e-6", "--eval_fraction", "0.2"),
    ]


def ppo(actor: str, made: Path) -> list[str]:
    model = [f"{made / 'reward-t5'}=0.5"] if (made / "reward-t5").is_dir() else []
    return [
        *("--actor_model_name_or_path", actor, "--eval_fraction", "0.2"),
        *("--reward", f"{FUNCTIONS}:overlap", *model),
        *("--per_device_generation_batch_size", str(4 // world_size()), "--max_prompt_seq_len", "32"),
        *("--per_device_training_batch_size", str(4 // world_size()), "--max_answer_seq_len", "6"),
        *("--max_iterations", "4", "--save_interval", "1", "--eval_prompts", "4", "--num_warmup_steps", "0"),
        *("--actor_learning_rate", "1e-3", "--actor_adam_epsilon", "1e-6", "--score_calibration", "running"),
    ]


if __name__ == "__main__":
    sys.exit(run_program(main))
