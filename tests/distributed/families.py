"""The runs that every family of models must go through, on 2 ranks."""

from __future__ import annotations

from typing import NamedTuple

from tests.distributed.variants import DEEPSPEED

RANKS = 2
EVAL_PROMPTS = 4


class Run(NamedTuple):
    """A step (1, 2, 3), the ZeRO stage of all its engines, and its flags, with {model} and {place} to be filled in."""

    step: int
    stage: int
    flags: str


_COMMON = f"--max_rows 150 --data_split 1,1,1 --dtype fp32 --no_enable_tensorboard --deepspeed_config {DEEPSPEED}"
_SUPERVISED = (
    f"{_COMMON} --model_name_or_path {{model}} --max_seq_len 64 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --per_device_eval_batch_size 8 --learning_rate 2e-3 --num_warmup_steps 0 "
    "--log_interval 1 --disable_dropout --enable_test_mode --test_stop_step 3"
)
_ROLLOUTS = (
    f"{_COMMON} --per_device_generation_batch_size 4 --per_device_training_batch_size 2 "
    "--gradient_accumulation_steps 2 --max_prompt_seq_len 48 --max_answer_seq_len 8 --num_warmup_steps 0 "
    f"--actor_learning_rate 1e-3 --max_iterations 2 --eval_prompts {EVAL_PROMPTS} --temperature 0.8"
)
_PPO = f"{_ROLLOUTS} --actor_model_name_or_path {{place}}/sft --critic_model_name_or_path {{place}}/reward"

# Of a decoder, for each ZeRO stage by name; one reads what the ones before it have written at the same stage.
DECODER_RUNS = {
    "zero2/sft": Run(1, 2, f"{_SUPERVISED} --gradient_checkpointing"),
    "zero2/packed": Run(1, 2, f"{_SUPERVISED} --packing"),
    "zero2/reward": Run(2, 2, _SUPERVISED),
    "zero2/ppo": Run(3, 2, _PPO),
    "zero3/sft": Run(1, 3, _SUPERVISED),
    "zero3/sft-lora": Run(1, 3, f"{_SUPERVISED} --lora_dim 4 --lora_learning_rate 5e-3 --gradient_checkpointing"),
    "zero3/reward": Run(2, 3, f"{_SUPERVISED} --gradient_checkpointing"),
    # Layer by layer, with generate() of transformers, in the place of generation mode.
    "zero3/ppo": Run(3, 3, f"{_PPO} --unpin_actor_parameters"),
    "zero3/ppo-lora": Run(3, 3, f"{_PPO} --actor_lora_dim 4 --critic_lora_dim 4 --actor_gradient_checkpointing"),
}

# Of an encoder: it writes no text; it becomes a reward model, which reads that of a built-in actor's responses.
ENCODER_RUNS = {
    f"zero{stage}/{name}": Run(step, stage, flags)
    for stage in (2, 3)
    for name, step, flags in (
        ("sft", 1, _SUPERVISED),
        ("reward", 2, _SUPERVISED),
        ("reward-lora", 2, f"{_SUPERVISED} --lora_dim 4 --lora_learning_rate 5e-3"),
        ("ppo", 3, f"{_ROLLOUTS} --actor_model_name_or_path builtin:tiny-opt --reward {{place}}/reward"),
    )
}
