"""Options of the programs for tests: configs, published command lines, and readers of flags and recipes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from common.config.parser import parse
from common.errors import UserError
from inference.chatbot import ChatConfig
from inference.evaluate import EvaluateConfig
from inference.generate import GenerateConfig
from inference.merge_lora import MergeConfig
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

STEPS = (SFTConfig, RewardConfig, PPOConfig)
PROGRAMS = (*STEPS, ChatConfig, EvaluateConfig, GenerateConfig, MergeConfig)
MODELS = "--actor_model_name_or_path ./a --critic_model_name_or_path ./c "

# The published command lines of the DeepSpeed recipe, as the launcher passes them on.
COMMAND_LINES = [
    (
        SFTConfig,
        "--local_rank=0 --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 "
        "--per_device_eval_batch_size 8 --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0 "
        "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
        "yitingxie/rlhf-reward-datasets --num_train_epochs 5 --deepspeed "
        "--output_dir ./output/actor-models/1.3b",
    ),
    (
        RewardConfig,
        "--local_rank=0 --model_name_or_path facebook/opt-350m --per_device_train_batch_size 8 "
        "--per_device_eval_batch_size 8 --num_padding_at_beginning 1 --weight_decay 0.1 --disable_dropout "
        "--gradient_accumulation_steps 4 --zero_stage 0 --deepspeed --output_dir ./output/reward-models/350m",
    ),
    (
        PPOConfig,
        "--local_rank=0 --actor_model_name_or_path ./output/actor-models/1.3b/ "
        "--critic_model_name_or_path ./output/reward-models/350m/ --actor_zero_stage 0 --critic_zero_stage 0 "
        "--num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 "
        "--enable_hybrid_engine --actor_gradient_checkpointing --disable_actor_dropout "
        "--per_device_train_batch_size 8 --per_device_mini_train_batch_size 8 "
        "--output_dir ./output/step3-models/1.3b/",
    ),
]


def read(cls, line: str = ""):
    return parse(cls, shlex.split(line), prog="program")


def message(cls, line: str) -> str:
    with pytest.raises(UserError) as caught:
        read(cls, line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"--config {path} "


class Unchecked:
    """The options of a step without the checks of values against each other."""

    def validate(self):
        pass
