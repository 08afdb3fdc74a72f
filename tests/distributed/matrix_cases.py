"""All three steps and DPO on preference data, for each combination of the matrix, in one process per rank; step 2 also
with an encoder, and KTO with some combinations.

Run under the launcher: matrix_cases.py [--long] DATA TEXTS MODEL ENCODER OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from alternatives.dpo.main import main as dpo
from common.runtime.distributed import world_size
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.distributed.matrix import EVAL_PROMPTS, KTO, LONG, ROWS_PER_STEP, SHORT, Combination
from tests.distributed.variants import DEEPSPEED


def main() -> None:
    data, texts, model, encoder, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    combinations = SHORT + LONG if "--long" in sys.argv else SHORT
    for combination in combinations:
        run(combination, data, texts, model, encoder, Path(output) / str(world_size()) / combination.name)
    if world_size() == 1:
        learn_the_builtin_task(encoder, Path(output) / "learnt")


def learn_the_builtin_task(encoder: str, output: Path) -> None:
    """Step 2 with an encoder, for as long as it takes to tell courteous answers from others."""
    step2(
        [
            "--data_path",
            "builtin:courtesy",
            "--data_output_path",
            str(output / "data"),
            "--model_name_or_path",
            encoder,
            "--output_dir",
            str(output / "encoder"),
            "--max_seq_len",
            "128",
            "--per_device_train_batch_size",
            "8",
            "--learning_rate",
            "1e-3",
            "--disable_dropout",
            "--dtype",
            "fp32",
            "--zero_stage",
            "0",
            "--no_enable_tensorboard",
            "--enable_test_mode",
            "--test_stop_step",
            "150",
        ]
    )


def run(combination: Combination, data: str, texts: str, model: str, encoder: str, output: Path) -> None:
    """Step 1, 2 and 3 in a row, each on what the one before has made, and step 2 with an encoder."""
    rows = ROWS_PER_STEP // world_size()
    common = [
        "--data_path",
        data,
        "--max_rows",
        "400",
        "--dtype",
        combination.dtype,
        "--no_enable_tensorboard",
        "--data_split",
        "1,1,1",
        "--deepspeed_config",
        DEEPSPEED,
    ]
    decoder = ["--data_output_path", str(output.parent / "data"), "--add_eot_token"]
    supervised = [
        *common,
        "--zero_stage",
        str(combination.zero_stage),
        "--max_seq_len",
        "64",
        "--per_device_train_batch_size",
        str(rows // 2),
        "--gradient_accumulation_steps",
        "2",
        "--per_device_eval_batch_size",
        "8",
        "--learning_rate",
        "2e-3",
        "--log_interval",
        "1",
        "--disable_dropout",
        "--enable_test_mode",
    ]
    lora = ["--lora_dim", "4", "--lora_learning_rate", "5e-3"] if combination.lora else []
    step1(
        [
            *supervised,
            *decoder,
            *lora,
            "--model_name_or_path",
            model,
            "--output_dir",
            str(output / "sft"),
            "--test_stop_step",
            "6",
            "--gradient_checkpointing",
        ]
    )
    for name, loss in [("dpo", "sigmoid"), *([("kto", "kto")] if combination in KTO else [])]:
        dpo(
            [
                *supervised,
                *decoder,
                *lora,
                *(["--keep_reference"] if combination.lora else []),
                "--data_output_path",
                str(output.parent / "dpo-data"),
                "--loss_type",
                loss,
                "--model_name_or_path",
                str(output / "sft"),
                "--output_dir",
                str(output / name),
                "--test_stop_step",
                "6",
                "--gradient_checkpointing",
            ]
        )
    step2(
        [
            *supervised,
            *decoder,
            *lora,
            "--model_name_or_path",
            model,
            "--output_dir",
            str(output / "reward"),
            "--test_stop_step",
            "6",
        ]
    )
    step2(
        [
            *supervised,
            *lora,
            "--data_output_path",
            str(output.parent / "encoder-data"),
            "--model_name_or_path",
            encoder,
            "--output_dir",
            str(output / "encoder"),
            "--test_stop_step",
            "6",
            "--gradient_checkpointing",
        ]
    )
    if combination.lora:
        kind = ["--actor_lora_dim", "4", "--critic_lora_dim", "4", "--ppo_epochs", "3", "--target_kl", "1e-9"]
    else:
        kind = ["--top_p", "0.9", "--truncated_sampling", "exact"]
    stage = str(combination.zero_stage)
    step3(
        [
            *common,
            *decoder,
            *kind,
            "--actor_model_name_or_path",
            str(output / "sft"),
            "--critic_model_name_or_path",
            str(output / "reward"),
            "--output_dir",
            str(output / "ppo"),
            "--actor_zero_stage",
            stage,
            "--critic_zero_stage",
            stage,
            "--per_device_generation_batch_size",
            str(rows // 2),
            "--generation_batches",
            "2",
            "--per_device_training_batch_size",
            str(rows // 4),
            "--gradient_accumulation_steps",
            "4",
            "--max_prompt_seq_len",
            "48",
            "--kl_controller",
            "adaptive",
            "--max_answer_seq_len",
            "12",
            "--eval_prompts",
            str(EVAL_PROMPTS),
            "--enable_ema",
            "--ema_decay",
            "0",
            "--unsupervised_dataset_name",
            texts,
            "--unsup_coef",
            "0.1",
            "--actor_gradient_checkpointing",
            "--num_warmup_steps",
            "0",
            "--actor_learning_rate",
            "1e-4",
            "--max_iterations",
            "2",
            "--temperature",
            "0.8",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
