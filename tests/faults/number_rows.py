"""The cases of `number_cases.py`."""

from common.errors import DIVERGED

# Name: step, where the NaN arises, ZeRO stage, dtype, LoRA, offload.
ENGINES = {
    f"{step}-{where.replace(' ', '-')}-zero{stage}-{dtype}{'-lora' if lora else ''}{'-offload' if offload else ''}": (
        step,
        where,
        stage,
        dtype,
        lora,
        offload,
    )
    for step, where, stage, dtype, lora, offload in [
        *(
            ("sft", "loss", stage, dtype, lora, False)
            for stage in (0, 2, 3)
            for dtype in ("fp32", "bf16")
            for lora in (False, True)
        ),
        *(
            ("ppo", "critic loss", stage, dtype, lora, False)
            for stage in (0, 2, 3)
            for dtype in ("fp32", "bf16")
            for lora in (False, True)
        ),
        *(("ppo", "actor gradient", stage, "fp32", False, False) for stage in (0, 2, 3)),
        *(
            ("warmup", "critic loss", stage, dtype, False, False)
            for stage, dtype in ((0, "fp32"), (2, "bf16"), (3, "bf16"))
        ),
        *((step, "gradient", 1, dtype, False, False) for step in ("sft", "reward") for dtype in ("fp32", "bf16")),
        *(("sft", "loss", stage, dtype, False, True) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    ]
}
# The default run takes half of the combinations, each value of each of them with the most unlike others.
SHORT = [
    name
    for name, (step, where, stage, dtype, lora, offload) in ENGINES.items()
    if (step == "ppo") + (stage > 0) + (dtype == "bf16") + lora + offload in (0, 2, 4)
]

_SAVING = "--save_interval 1 --keep_checkpoints 1 --num_train_epochs 4"
# The third step that is lost would be the last of an epoch, in which rank 1 has no row, and so no loss that is lost.
_SFT = f"{_SAVING} --per_device_train_batch_size 2 --max_skipped_steps 2"
_PPO = f"{_SAVING} --num_train_epochs 8 --per_device_training_batch_size 4 --max_skipped_steps 2"
_RUNAWAY = "--actor_learning_rate 0.1 --kl_coef 0 --num_warmup_steps 8"


def _skipped(times: int) -> str:
    return (
        f"on rank 1 is not finite: {times} optimizer steps in a row are skipped: {DIVERGED}; --max_skipped_steps "
        f"{times} allows no more"
    )


# Name: step, flags, what is poisoned, what is said, the checkpoints that are left.
RUNS = {
    "loss": ("sft", f"{_SFT} --zero_stage 3", "loss", f"the loss {_skipped(2)}", ["step-2", "step-3"]),
    "first": (
        "reward",
        "--max_skipped_steps 1 --save_interval 0 --num_train_epochs 4",
        "gradient",
        f"the model gradient {_skipped(1)}",
        [],
    ),
    "value-loss": (
        "ppo",
        f"{_PPO} --critic_zero_stage 2",
        "critic loss",
        f"the value loss {_skipped(2)}",
        ["step-2", "step-3"],
    ),
    "actor-gradient": (
        "ppo",
        f"{_PPO} --actor_zero_stage 3 --dtype bf16",
        "actor gradient",
        f"the actor gradient {_skipped(2)}",
        ["step-2", "step-3"],
    ),
    "kl": (
        "ppo",
        f"{_PPO} {_RUNAWAY} --max_kl 4",
        "",
        "the mean KL to the reference of the answers of iteration",
        None,
    ),
    "reward": ("ppo", f"{_PPO} --min_reward 100", "", "the mean reward of the answers of iteration 1 is", []),
}
AUTO = "--num_train_epochs 2 --gradient_accumulation_steps 2 --dropout 0.1"
# Those that end well, each whole and broken off; the same must come out.
_ROWS = "--max_skipped_steps 50 --num_train_epochs 8 --save_interval 2"
_SKIPS = {
    "sft-skips": ("sft", f"{_ROWS} --per_device_train_batch_size 2 --dropout 0.1"),
    "ppo-skips": (
        "ppo",
        f"{_ROWS} --per_device_training_batch_size 1 --enable_ema --max_kl 1e3 "
        "--unsupervised_dataset_name {inputs}/texts.jsonl",
    ),
}
RUNS |= {name: (*case, "rows", None, []) for name, case in _SKIPS.items()}
RUNS |= {f"{name}-broken-off": (*case, "breaks off", None, []) for name, case in _SKIPS.items()}
