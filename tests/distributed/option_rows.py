"""For every option of every step, a changed value and the part of a run that it must change."""

from __future__ import annotations

from typing import NamedTuple

from alternatives.dpo.config import DPOConfig
from common.config.parser import Config, options
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig


class Row(NamedTuple):
    """One option's proof: two runs that differ in its value alone.

    Attributes:
        part: of the fingerprint (see `option_cases.fingerprint`), the one that must differ.
        value: the changed value; a boolean's may be left out.
        base: flags that both runs have, where the option needs them to count. {inputs} is the directory of
            `option_inputs`, {elsewhere} an empty one that each run has for itself.
    """

    part: str
    value: str = ""
    base: str = ""


RUN = {
    "output_dir": Row("elsewhere", "{elsewhere}/output"),
    "dtype": Row("metrics", "bf16"),
    "seed": Row("metrics", "7"),
    "deepspeed_config": Row("engines", "{inputs}/deepspeed.json"),
    "timeout": Row("timeout", "77"),
    "save_interval": Row("checkpoints", "1"),
    "keep_checkpoints": Row("checkpoints", "3", "--save_interval 1 --num_train_epochs 3"),
    "resume": Row("error", "{inputs}/no-checkpoint"),
    "report_to": Row("files", "wandb"),
    "enable_tensorboard": Row("files"),
    "tensorboard_path": Row("elsewhere", "{elsewhere}/board", "--enable_tensorboard"),
    "enable_test_mode": Row("metrics", "true --test_stop_step 1"),
    "test_stop_step": Row("metrics", "2", "--enable_test_mode --test_stop_step 1"),
}

DATA = {
    "data_path": Row("metrics", "{inputs}/other.jsonl"),
    "data_split": Row("metrics", "1,2,3"),
    "eval_fraction": Row("metrics", "0.5"),
    "split_by": Row("metrics", "column:question"),
    "columns": Row("metrics", "prompt=question"),
    "data_field": Row("metrics", "second", "--data_path {inputs}/two-keys.json --data_field first"),
    "encoding": Row("metrics", "cp437", "--data_path {inputs}/western.jsonl --encoding cp1252"),
    "template": Row("metrics", "question_answer"),
    "add_eot_token": Row("files"),
    "eot_token": Row("files", "<|stop|>", "--add_eot_token"),
    "max_rows": Row("metrics", "20"),
    "max_bad_rows": Row("error", "0.5", "--data_path {inputs}/spoilt.jsonl"),
    "data_output_path": Row("elsewhere", "{elsewhere}/data"),
}

SCHEDULE = {
    "num_warmup_steps": Row("weights", "2"),
    "num_train_epochs": Row("metrics", "2"),
    "gradient_accumulation_steps": Row("weights", "2"),
    "max_tokens_per_micro_batch": Row("passes", "40"),
    "auto_micro_batch": Row("printed"),
    "lr_scheduler_type": Row("weights", "constant"),
    "max_grad_norm": Row("weights", "0.01"),
}

_LORA = "--lora_dim 2"
SUPERVISED = {
    **RUN,
    **DATA,
    **SCHEDULE,
    "template_date": Row("metrics", "2020-02-29", "--template chat --model_name_or_path {inputs}/dated-model"),
    "model_name_or_path": Row("metrics", "{inputs}/other-model"),
    "trust_remote_code": Row("error", base="--model_name_or_path {inputs}/own-code"),
    "merge_adapter": Row("error", base="--model_name_or_path {inputs}/adapted"),
    "learning_rate": Row("weights", "0.002"),
    "eval_iters": Row("metrics", "1", "--per_device_eval_batch_size 2"),
    "per_device_train_batch_size": Row("weights", "2"),
    "per_device_eval_batch_size": Row("metrics", "2", "--eval_iters 1"),
    "max_seq_len": Row("metrics", "20"),
    "group_by_length": Row("metrics", "", "--per_device_train_batch_size 1"),
    "weight_decay": Row("weights", "0.5"),
    "adam_epsilon": Row("weights", "0.1"),
    "zero_stage": Row("engines", "1"),
    "offload": Row("engines", base="--zero_stage 1"),
    "gradient_checkpointing": Row("passes"),
    "dropout": Row("weights", "0.5"),
    "disable_dropout": Row("weights"),
    "eval_interval": Row("metrics", "1"),
    "log_interval": Row("metrics", "2"),
    "print_loss": Row("printed"),
    "lora_dim": Row("weights", "2"),
    "lora_alpha": Row("weights", "1", _LORA),
    "lora_dropout": Row("weights", "0.5", _LORA),
    "lora_module_name": Row("weights", "q_proj", _LORA),
    "lora_learning_rate": Row("weights", "0.01", _LORA),
    "quantize": Row("weights", "nf4", _LORA),
}

_STREAM = "--stream --max_steps 3"
SFT = {
    **SUPERVISED,
    "sft_only_data_path": Row("metrics", "{inputs}/other.jsonl"),
    "train_on_prompt": Row("metrics"),
    "packing": Row("weights"),
    "eval_max_seq_len": Row("metrics", "20"),
    "stream": Row("metrics", "true --max_steps 3"),
    "max_steps": Row("metrics", "2", _STREAM),
    "shuffle_buffer": Row("metrics", "3", _STREAM),
    "stream_sample": Row("metrics", "12", _STREAM),
}

REWARD = {
    **SUPERVISED,
    "pairs_per_prompt": Row("metrics", "1", "--data_path {inputs}/several.jsonl"),
    "margin": Row("metrics", "1"),
    "margin_column": Row("metrics", "strength"),
    "centring_coef": Row("metrics", "0.1"),
}


DPO = {
    "loss_type": Row("metrics", "ipo"),
    "beta": Row("metrics", "0.5"),
    "label_smoothing": Row("metrics", "0.2"),
    "target_margin": Row("metrics", "1", "--loss_type simpo --no_keep_reference"),
    "sft_coef": Row("metrics", "0.5"),
    "desirable_weight": Row("metrics", "2", "--loss_type kto"),
    "undesirable_weight": Row("metrics", "2", "--loss_type kto"),
    "keep_reference": Row("samples", "false"),
}


def _of_role(role: str) -> dict[str, Row]:
    """The options that actor and critic both have."""
    lora = f"--{role}_lora_dim 2"
    return {
        f"{role}_learning_rate": Row("weights", "0.002"),
        f"{role}_weight_decay": Row("weights", "0.5"),
        f"{role}_adam_epsilon": Row("weights", "0.1"),
        f"{role}_zero_stage": Row("engines", "1"),
        f"{role}_gradient_checkpointing": Row("passes"),
        f"{role}_lora_dim": Row("weights", "2"),
        f"{role}_lora_alpha": Row("weights", "1", lora),
        f"{role}_lora_module_name": Row("weights", "q_proj", lora),
        f"{role}_lora_learning_rate": Row("weights", "0.01", lora),
        f"{role}_quantize": Row("weights", "nf4", lora),
    }


_TEXTS = "--unsupervised_dataset_name {inputs}/texts.jsonl"
_ADAPTIVE = "--kl_controller adaptive --kl_horizon 20 --num_train_epochs 2"
_EQUAL = "--answers_per_prompt 2 --top_k 1"  # all answers to a prompt are the same
_STOPPING_CRITIC = "--critic_model_name_or_path {inputs}/stopping-reward_model"  # its tokenizer's end token is <|stop|>
_REWARD = "--reward {inputs}/rewards.py:rest"  # tells its columns and its process apart
PPO = {
    **RUN,
    **DATA,
    **SCHEDULE,
    **_of_role("actor"),
    **_of_role("critic"),
    "actor_model_name_or_path": Row("metrics", "{inputs}/other-model"),
    "critic_model_name_or_path": Row("metrics", "{inputs}/other-reward_model"),
    "add_eot_token": Row("error", "true --eot_token <|stop|>", _STOPPING_CRITIC),
    "eot_token": Row("error", "<|stop|>", f"--add_eot_token {_STOPPING_CRITIC}"),
    "trust_remote_code": Row("error", base="--actor_model_name_or_path {inputs}/own-code"),
    "merge_adapter": Row("error", base="--actor_model_name_or_path {inputs}/adapted"),
    "template_date": Row(
        "metrics",
        "2020-02-29",
        "--template chat --actor_model_name_or_path {inputs}/dated-model "
        "--critic_model_name_or_path {inputs}/dated-reward_model",
    ),
    "offload": Row("engines", base="--actor_zero_stage 1"),
    "offload_in_rollouts": Row("printed"),
    "offload_reference_model": Row("engines"),
    "offload_reward_model": Row("engines"),
    "eval_interval": Row("metrics", "1"),
    "eval_prompts": Row("samples", "2"),
    "log_interval": Row("metrics", "2"),
    "print_answers": Row("printed"),
    "print_answers_interval": Row("printed", "2", "--print_answers"),
    "per_device_generation_batch_size": Row("metrics", "8"),
    "generation_batches": Row("metrics", "2"),
    "max_prompt_seq_len": Row("metrics", "12"),
    "max_answer_seq_len": Row("samples", "3"),
    "min_answer_seq_len": Row("samples", "2"),
    "draw_answer_lengths": Row("samples"),
    "answers_per_prompt": Row("metrics", "2"),
    "unpin_actor_parameters": Row("passes", base="--actor_zero_stage 3"),
    "release_inference_cache": Row("caches"),
    "temperature": Row("samples", "0.5"),
    "top_p": Row("samples", "0.5"),
    "top_k": Row("samples", "5"),
    "truncated_sampling": Row("weights", "exact", "--top_k 5 --auto_micro_batch"),
    "reward": Row("metrics", "{inputs}/rewards.py:length"),
    "reward_workers": Row("metrics", "1", _REWARD),
    "reward_timeout": Row("error", "0.01", "--reward {inputs}/rewards.py:slow --reward_workers 1"),
    "reward_errors": Row("error", "zero", "--reward {inputs}/rewards.py:picky"),
    "keep_columns": Row("metrics", "question", _REWARD),
    "reward_quantize": Row("metrics", "nf4"),
    "kl_coef": Row("weights", "3"),
    "kl_controller": Row("weights", "adaptive"),
    "kl_placement": Row("weights", "loss", "--ppo_epochs 2"),
    "kl_estimator": Row("metrics", "k3", "--kl_placement loss --ppo_epochs 2"),
    "kl_target": Row("weights", "0.0001", _ADAPTIVE),
    "kl_horizon": Row("weights", "5", _ADAPTIVE),
    "score_calibration": Row("weights", "none"),
    "normalize_scores": Row("weights", "false", "--critic_model_name_or_path {inputs}/calibrated"),
    "score_clip": Row("weights", "0.1"),
    "missing_eos_penalty": Row("weights", "3"),
    "missing_eos_score": Row("weights", "-3"),
    "max_iterations": Row("metrics", "1"),
    "per_device_training_batch_size": Row("weights", "1"),
    "ppo_epochs": Row("weights", "2"),
    "policy_loss": Row("weights", "cispo"),
    "clip_range": Row("weights", "0.0001"),
    "clip_range_high": Row("weights", "0.0001"),
    "dual_clip": Row("weights", "1.0001", "--ppo_epochs 2"),
    "loss_aggregation": Row("weights", "sequence"),
    "value_clip_range": Row("weights", "0.0001", "--ppo_epochs 2"),
    "advantage": Row("weights", "rloo", "--answers_per_prompt 2"),
    "gamma": Row("weights", "0.5"),
    "gae_lambda": Row("weights", "0.5"),
    "gae_lambda_alpha": Row("weights", "0.5"),
    "critic_gae_lambda": Row("weights", "0.5"),
    "whiten_advantages": Row("weights", "false"),
    "max_kl": Row("error", "1e-9", "--num_train_epochs 4 --max_iterations 8"),
    "max_reward": Row("error", "-100"),
    "min_reward": Row("error", "100"),
    "drop_equal_groups": Row("weights", "", _EQUAL),
    "max_refills": Row("metrics", "2", f"{_EQUAL} --drop_equal_groups"),
    "mask_truncated_answers": Row("weights"),
    "overlong_buffer": Row("weights", "4"),
    "overlong_penalty": Row("weights", "3", "--overlong_buffer 4"),
    "critic_warmup_iterations": Row("weights", "1"),
    "target_kl": Row("weights", "0.0000001", "--ppo_epochs 2"),
    "enable_ema": Row("weights"),
    "ema_decay": Row("weights", "0.5", "--enable_ema"),
    "unsupervised_dataset_name": Row("weights", "{inputs}/texts.jsonl"),
    "unsupervised_dataset_config_name": Row(
        "weights", "cooking", "--unsupervised_dataset_name owner/texts --unsupervised_dataset_config_name counting"
    ),
    "unsup_coef": Row("weights", "1", _TEXTS),
}

_COMMON = (
    "--data_path {inputs}/pairs.jsonl --data_split 1,1,1 --eval_fraction 0.2 --log_interval 1 --no_enable_tensorboard "
)
_COMMON_SUPERVISED = _COMMON + (
    "--model_name_or_path {inputs}/model --max_seq_len 64 --learning_rate 0.01 "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4"
)


class Step(NamedTuple):
    config: type[Config]
    rows: dict[str, Row]
    flags: str  # of every run
    shared: type[Config] = Config  # a step that shows the options that both have, by the same code


STEPS = {
    "sft": Step(SFTConfig, SFT, _COMMON_SUPERVISED),
    "reward": Step(RewardConfig, REWARD, _COMMON_SUPERVISED),
    # With a reference that is kept a second run does the same as the first, which writes nothing beside the data.
    "dpo": Step(DPOConfig, DPO, f"{_COMMON_SUPERVISED} --keep_reference", shared=RewardConfig),
    "ppo": Step(
        PPOConfig,
        PPO,
        _COMMON
        + (
            "--actor_model_name_or_path {inputs}/model --critic_model_name_or_path {inputs}/reward_model "
            "--per_device_generation_batch_size 4 --per_device_training_batch_size 2 --max_prompt_seq_len 32 "
            "--max_answer_seq_len 6 --eval_prompts 3 --num_warmup_steps 0 --actor_zero_stage 0 --critic_zero_stage 0 "
            "--actor_learning_rate 0.01 --critic_learning_rate 0.01"
        ),
    ),
}


def runs(step: Step) -> dict[str, str]:
    """The flags of all runs of a step: the base runs by their own flags, the others by name."""
    bases = {row.base: row.base for row in step.rows.values()}
    changed = {name: f"{row.base} --{name} {row.value}" for name, row in step.rows.items()}
    return {"": "", "again": "", **bases, **changed, "ignored": ignored_flags(step.config)}


def ignored_flags(config: type[Config]) -> str:
    """All options without effect at once, each with a value that is not its default."""
    values = {bool: "true", int: "3", float: "0.5"}
    return " ".join(f"--{name} {values[meta.kind]}" for name, meta in options(config).items() if meta.ignored)
