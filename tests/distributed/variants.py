"""Variants that the tests of this directory run: micro-batch layouts, engines for rollouts, interrupted runs."""

from pathlib import Path

# So that ZeRO-3 partitions some layers of tiny models and keeps others whole, and gradients need several buckets.
DEEPSPEED = str(Path(__file__).with_name("deepspeed.json"))
# The same for layers whose weights take half as many numbers.
DEEPSPEED_QUANTIZED = str(Path(__file__).with_name("deepspeed_quantized.json"))


FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))  # see --reward


class Tokens(int):
    """So many tokens, with padding, in a micro-batch of each rank, in place of a number of rows."""


# Name: ZeRO stage, rows per micro-batch over all ranks or tokens, gradient checkpointing, LoRA, offload.
VARIANTS = {
    "whole": (0, 8, False, False, False),
    "accumulated": (0, 2, False, False, False),
    "zero2": (2, 4, False, False, False),
    "zero3": (3, 4, False, False, False),
    "zero3-checkpointed": (3, 8, True, False, False),
    "zero3-offloaded": (3, 4, False, False, True),
    "lora": (0, 8, False, True, False),
    "lora-zero3": (3, 4, False, True, False),
    "tokens-zero3": (3, Tokens(40), True, False, False),
}

# Those that the policy losses besides PPO's own run in, critic-free.
LOSSES_IN = ("whole", "accumulated", "zero2", "tokens-zero3")

# Those that also make a step of PPO in which truncated responses are left out.
TRUNCATED = ("whole", "accumulated", "zero3")

# As VARIANTS, at length.
VARIANTS_AT_LENGTH = {
    "checkpointed": (0, 8, True, False, False),
    "tokens": (0, Tokens(40), False, False, False),
    "zero1": (1, 4, False, False, False),
    "zero2-offloaded": (2, 4, False, False, True),
    "lora-zero2": (2, 4, True, True, False),
    "tokens-zero2": (2, Tokens(40), False, False, False),
}


_GENERATION = {
    f"zero{stage}-{kind}-{dtype}": (stage, kind == "lora", dtype)
    for stage in (0, 1, 2, 3)
    for kind in ("full", "lora")
    for dtype in ("fp32", "bf16")
} | {
    f"zero{stage}-{quantize}-{dtype}": (stage, True, dtype, quantize)
    for stage in (0, 2, 3)
    for quantize in ("nf4", "int8")
    for dtype in ("fp32", "bf16")
}
_LESS_LIKELY_TO_FAIL = ("zero0-full-bf16", "zero0-lora-bf16", "zero2-full-fp32", "zero2-lora-bf16", "zero3-full-bf16")
_LESS_LIKELY_TO_FAIL += ("zero0-nf4-bf16", "zero2-nf4-fp32", "zero2-nf4-bf16", "zero3-nf4-bf16")

# Name: ZeRO stage, LoRA, dtype of the actor that rollouts are made with, and how it is quantised, if it is.
GENERATION = {
    name: case
    for name, case in _GENERATION.items()
    if case[0] != 1 and "int8" not in name and name not in _LESS_LIKELY_TO_FAIL
}

# The same, at length.
GENERATION_AT_LENGTH = {name: case for name, case in _GENERATION.items() if name not in GENERATION}

# Name: step, flags of a run that breaks off and is resumed.
RESUMED = {
    "sft-zero3-lora": ("sft", ("--zero_stage", "3", "--lora_dim", "4", "--dropout", "0")),
    "sft-stream": (
        "sft",
        (
            *("--stream", "--max_steps", "11", "--num_train_epochs", "1", "--shuffle_buffer", "20"),
            *("--stream_sample", "50", "--packing", "--eval_max_seq_len", "48", "--dropout", "0"),
        ),
    ),
    "reward-zero2-lora-dropout": ("reward", ("--zero_stage", "2", "--lora_dim", "4", "--dropout", "0.1")),
    "dpo-zero2-lora": ("dpo", ("--zero_stage", "2", "--lora_dim", "4", "--learning_rate", "1e-3")),
    "kto-zero2": (
        "dpo",
        ("--zero_stage", "2", "--loss_type", "kto", "--adam_epsilon", "1e-6"),  # as with ppo-groups
    ),
    "ppo-ema": (
        "ppo",
        (
            "--actor_zero_stage",
            "0",
            "--critic_zero_stage",
            "0",
            "--enable_ema",
            "--score_calibration",
            "rollout",
            "--kl_placement",
            "loss",
            "--kl_estimator",
            "k3",
            "--kl_controller",
            "adaptive",
        ),
    ),
    "ppo-zero3-bf16-lora": (
        "ppo",
        (
            "--actor_zero_stage",
            "3",
            "--critic_zero_stage",
            "3",
            "--dtype",
            "bf16",
            "--actor_lora_dim",
            "4",
            "--critic_lora_dim",
            "4",
            "--enable_ema",
            "--top_k",
            "20",
            "--truncated_sampling",
            "exact",
        ),
    ),
    "ppo-zero2-rloo": (
        "ppo",
        (
            "--advantage",
            "rloo",
            "--answers_per_prompt",
            "2",
            "--score_calibration",
            "rollout",
            "--top_p",
            "0.8",
            "--min_answer_seq_len",
            "2",
            "--truncated_sampling",
            "exact",
        ),
    ),
    "ppo-zero3-grpo": (
        "ppo",
        (
            "--actor_zero_stage",
            "3",
            "--advantage",
            "grpo",
            "--answers_per_prompt",
            "2",
            "--kl_placement",
            "none",
        ),
    ),
    "ppo-groups": (
        "ppo",
        (
            "--advantage",
            "rloo",
            "--answers_per_prompt",
            "2",
            "--drop_equal_groups",
            "--max_refills",
            "2",
            "--actor_adam_epsilon",
            "1e-6",  # so that gradients of nothing but rounding, as of OPT's key biases, move nothing
        ),
    ),
    "sft-zero2-nf4": ("sft", ("--zero_stage", "2", "--lora_dim", "4", "--quantize", "nf4", "--gradient_checkpointing")),
    "ppo-zero3-nf4-int8": (
        "ppo",
        (
            *("--actor_zero_stage", "3", "--actor_lora_dim", "4", "--actor_quantize", "nf4", "--enable_ema"),
            *("--critic_zero_stage", "3", "--critic_lora_dim", "4", "--critic_quantize", "int8", "--dtype", "bf16"),
            *("--deepspeed_config", DEEPSPEED_QUANTIZED),
        ),
    ),
    "ppo-critic-warmup": ("ppo", ("--critic_warmup_iterations", "5", "--enable_ema")),
    "ppo-functions": (
        "ppo",
        (
            *("--reward", f"{FUNCTIONS}:overlap", f"{FUNCTIONS}:length=0.1"),
            *("--reward_workers", "1", "--score_calibration", "running"),
        ),
    ),
}
# Those of RESUMED with a function as reward: half of the groups of two responses are equal.
WITH_FUNCTION = ("ppo-groups",)

# Name: step, flags; then those that are added when it is resumed, which only change its evaluations.
EVALUATED_OTHERWISE = {
    "sft-dropout-evaluated": (
        "sft",
        ("--zero_stage", "2", "--dropout", "0.1", "--save_interval", "2"),
        ("--eval_interval", "1", "--eval_iters", "2", "--per_device_eval_batch_size", "3"),
    ),
    "ppo-evaluated": ("ppo", (), ("--eval_interval", "1", "--eval_prompts", "7")),
}

# As RESUMED, at length.
RESUMED_AT_LENGTH = {
    "sft-dropout": ("sft", ("--dropout", "0.1")),
    "sft-zero1-bf16": ("sft", ("--zero_stage", "1", "--dtype", "bf16")),
    "sft-zero2-lora-dropout": ("sft", ("--zero_stage", "2", "--lora_dim", "4", "--lora_dropout", "0.1")),
    "reward-bf16": ("reward", ("--dtype", "bf16")),
    "ppo-zero3-ema": ("ppo", ("--actor_zero_stage", "3", "--critic_zero_stage", "3", "--enable_ema")),
    "reward-zero3-int8": ("reward", ("--zero_stage", "3", "--lora_dim", "4", "--quantize", "int8", "--dtype", "bf16")),
    "ppo-rloo-reward-nf4": (
        "ppo",
        (
            *("--advantage", "rloo", "--answers_per_prompt", "2", "--reward_quantize", "nf4"),
            *("--actor_zero_stage", "2", "--actor_lora_dim", "4", "--actor_quantize", "int8", "--offload"),
            "--offload_reward_model",
        ),
    ),
    "ppo-zero2-bf16-lora": ("ppo", ("--actor_lora_dim", "4", "--critic_lora_dim", "4", "--dtype", "bf16")),
}

# Those of RESUMED that are also continued by another number of ranks; without dropout, which is drawn by rank.
RESHAPED = ("sft-zero3-lora", "sft-stream", "kto-zero2", "ppo-ema", "ppo-groups")

# The same, at length.
_SUPERVISED_LORA = ("--lora_dim", "4", "--lora_learning_rate", "2e-3")
_PPO_LORA = ("--actor_lora_dim", "4", "--critic_lora_dim", "4", "--actor_lora_learning_rate", "2e-3")


def _supervised(stage: int) -> tuple[str, ...]:
    return "--zero_stage", str(stage), "--weight_decay", "0.1", "--dropout", "0"


def _ppo(actor: int, critic: int) -> tuple[str, ...]:
    return "--actor_zero_stage", str(actor), "--critic_zero_stage", str(critic), "--enable_ema"


RESHAPED_AT_LENGTH = {
    **{f"sft-zero{stage}": ("sft", _supervised(stage)) for stage in (0, 1, 2, 3)},
    **{f"sft-zero{stage}-lora": ("sft", (*_supervised(stage), *_SUPERVISED_LORA)) for stage in (0, 1, 2, 3)},
    **{f"sft-zero{stage}-bf16": ("sft", (*_supervised(stage), "--dtype", "bf16")) for stage in (0, 1, 3)},
    **{
        f"sft-zero{stage}-nf4": ("sft", (*_supervised(stage), *_SUPERVISED_LORA, "--quantize", "nf4"))
        for stage in (2, 3)
    },
    "reward-zero1": ("reward", _supervised(1)),
    "reward-zero3-lora": ("reward", (*_supervised(3), *_SUPERVISED_LORA)),
    **{f"ppo-zero{stage}": ("ppo", _ppo(stage, stage)) for stage in (1, 2, 3)},
    **{f"ppo-zero{stage}-lora": ("ppo", (*_ppo(stage, stage), *_PPO_LORA)) for stage in (0, 2, 3)},
    "ppo-zero3-and-0": ("ppo", _ppo(3, 0)),
}

# Name: step, encoder-decoder model or the case that makes it, flags of a run that is also broken off and resumed.
_RLOO = ("--advantage", "rloo", "--answers_per_prompt", "2")
ENCODER_DECODERS = {
    "sft-flan-t5": ("sft", "flan-t5", ("--zero_stage", "3", "--lora_dim", "4", "--gradient_checkpointing")),
    "ppo-gae": ("ppo", "t5", ("--actor_zero_stage", "3", "--critic_zero_stage", "2", "--enable_ema")),
}

# The same, at length.
_GAE_LORA = ("--actor_lora_dim", "4", "--critic_lora_dim", "4", "--critic_gradient_checkpointing")
ENCODER_DECODERS_AT_LENGTH = {
    "reward-t5": ("reward", "t5", ("--zero_stage", "3")),
    "ppo-rloo": ("ppo", "sft-flan-t5", (*_RLOO, "--actor_zero_stage", "3", "--actor_lora_dim", "4")),
    "sft-zero0": ("sft", "t5", ("--zero_stage", "0")),
    "sft-zero2": ("sft", "t5", ("--zero_stage", "2")),
    "sft-zero3": ("sft", "flan-t5", ("--zero_stage", "3")),
    "sft-zero3-bf16": ("sft", "t5", ("--zero_stage", "3", "--dtype", "bf16")),
    "ppo-zero0-rloo": (
        "ppo",
        "t5",
        (*_RLOO, "--actor_zero_stage", "0", "--top_k", "20", "--truncated_sampling", "exact"),
    ),
    "ppo-zero3-layers": ("ppo", "flan-t5", (*_RLOO, "--actor_zero_stage", "3", "--unpin_actor_parameters")),
    "ppo-zero3-gae-lora": ("ppo", "flan-t5", ("--actor_zero_stage", "3", "--critic_zero_stage", "3", *_GAE_LORA)),
    "ppo-zero2-gae-lora": ("ppo", "t5", ("--actor_zero_stage", "2", "--critic_zero_stage", "2", *_GAE_LORA)),
    "ppo-zero0-gae": ("ppo", "t5", ("--actor_zero_stage", "0", "--critic_zero_stage", "0", "--dtype", "bf16")),
}
