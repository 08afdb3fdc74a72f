"""Combinations of options that are refused, and options that have no effect."""

from __future__ import annotations

import pytest

from common.errors import UserError
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.command_lines import MODELS, message, read, recipe

CONTRADICTION = "contradict each other: keep one"


@pytest.mark.parametrize(
    "cls, line, part",
    [
        (SFTConfig, "--data_split 2,4", "--data_split"),
        (SFTConfig, "--data_split 0,5,5", "leaves nothing for step 1"),
        (RewardConfig, "--data_split 10,0,0", "leaves nothing for step 2"),
        (SFTConfig, "--data_path a:0", "--data_path"),
        (SFTConfig, "--sft_only_data_path a:-1", "--sft_only_data_path"),
        (SFTConfig, "--disable_dropout --dropout 0.1", "--disable_dropout"),
        (SFTConfig, "--offload", "--zero_stage"),
        (SFTConfig, "--lora_dropout 0.1", "--lora_dim above 0"),
        (
            RewardConfig,
            "--quantize int8",
            "--quantize int8 holds weights that cannot be trained: add adapters with --lora",
        ),
        (PPOConfig, MODELS + "--actor_quantize nf4 --critic_lora_dim 4", "add adapters with --actor_lora_dim 16"),
        (PPOConfig, MODELS + "--critic_quantize nf4", "add adapters with --critic_lora_dim 16"),
        (SFTConfig, "--quantize int4 --lora_dim 4", "none, nf4, int8"),
        (SFTConfig, "--lr_scheduler_type constant --num_warmup_steps 5", "--num_warmup_steps 5"),
        (PPOConfig, MODELS + "--lr_scheduler_type constant --num_warmup_steps 5", "constant_with_warmup"),
        (SFTConfig, "--eot_token x", "--add_eot_token"),
        (SFTConfig, "--enable_test_mode", "--test_stop_step"),
        (SFTConfig, "--test_stop_step 5", "--enable_test_mode"),
        (SFTConfig, "--no_enable_tensorboard --tensorboard_path b", "--enable_tensorboard"),
        (SFTConfig, "--model_name_or_path ./m --output_dir m", "--model_name_or_path"),
        (PPOConfig, MODELS + "--output_dir ./a/", "--actor_model_name_or_path"),
        (PPOConfig, MODELS + "--min_answer_seq_len 300", "--max_answer_seq_len"),
        (PPOConfig, MODELS + "--kl_target 3", "--kl_controller adaptive"),
        (PPOConfig, MODELS + "--kl_controller adaptive --kl_coef 0", "--kl_coef"),
        (PPOConfig, MODELS + "--no_normalize_scores --score_calibration rollout", "contradict"),
        (PPOConfig, MODELS + "--kl_estimator k2", "--kl_placement loss"),
        (PPOConfig, MODELS + "--kl_estimator k3 --kl_placement reward", "--kl_placement loss"),
        (
            PPOConfig,
            MODELS + "--advantage grpo --answers_per_prompt 4 --kl_estimator k3 --kl_placement reward",
            "--kl_placement loss",
        ),
        (PPOConfig, MODELS + "--gae_lambda 0.9 --gae_lambda_alpha 0.05", f"--gae_lambda_alpha 0.05 {CONTRADICTION}"),
        (PPOConfig, MODELS + "--dual_clip 1", "above 1"),
        (PPOConfig, MODELS + "--loss_aggregation mean", "token, sequence, constant"),
        (
            PPOConfig,
            MODELS + "--missing_eos_score 0 --missing_eos_penalty 2",
            f"--missing_eos_penalty 2 and --missing_eos_score 0 {CONTRADICTION}",
        ),
        (
            SFTConfig,
            "--auto_micro_batch --max_tokens_per_micro_batch 9",
            f"--auto_micro_batch and --max_tokens_per_micro_batch 9 {CONTRADICTION}",
        ),
        (PPOConfig, MODELS + "--truncated_sampling exact", "works only with --top_p, --top_k"),
        (PPOConfig, MODELS + "--missing_eos_score -1 --draw_answer_lengths", "--missing_eos_score"),
        (PPOConfig, MODELS + "--ema_decay 0.9", "--enable_ema"),
        (PPOConfig, MODELS + "--unsup_coef 1", "--unsupervised_dataset_name"),
        (PPOConfig, MODELS + "--critic_lora_alpha 4", "--critic_lora_dim"),
        (PPOConfig, MODELS + "--offload --actor_zero_stage 0 --critic_zero_stage 0", "--actor_zero_stage"),
        (
            PPOConfig,
            MODELS + "--offload --advantage rloo --answers_per_prompt 2 --actor_zero_stage 0 --critic_zero_stage 2",
            "--offload needs --actor_zero_stage 1, 2 or 3",
        ),
        (PPOConfig, MODELS + "--print_answers_interval 4", "--print_answers"),
        (PPOConfig, MODELS + "--temperature 0", "above 0"),
        (PPOConfig, MODELS + "--drop_equal_groups", "--answers_per_prompt 2"),
        (PPOConfig, MODELS + "--max_refills 2", "--drop_equal_groups"),
        (PPOConfig, MODELS + "--overlong_penalty 2", "--overlong_buffer above 0"),
        (PPOConfig, MODELS + "--overlong_buffer 9 --max_answer_seq_len 8", "--overlong_buffer 9 is above"),
        (
            PPOConfig,
            MODELS + "--mask_truncated_answers --draw_answer_lengths",
            "--draw_answer_lengths lets no answer end",
        ),
        (
            PPOConfig,
            MODELS + "--critic_warmup_iterations 1 --advantage rloo --answers_per_prompt 2",
            "--critic_warmup_iterations 1 trains the critic alone",
        ),
        (SFTConfig, "--adam_epsilon 0", "above 0"),
        (SFTConfig, "--stream", "--stream needs --max_steps"),
        (SFTConfig, "--max_steps 5", "--max_steps works only with --stream"),
        (SFTConfig, "--shuffle_buffer 5", "--shuffle_buffer works only with --stream"),
        (SFTConfig, "--stream --max_steps 5 --num_train_epochs 2", "--num_train_epochs has no meaning with --stream"),
        (SFTConfig, "--stream --max_steps 5 --group_by_length", "--group_by_length needs all rows"),
        (SFTConfig, "--max_seq_len 64 --eval_max_seq_len 65", "--eval_max_seq_len 65 is above --max_seq_len 64"),
    ],
)
def test_values_that_do_not_go_together(cls, line, part):
    assert part in message(cls, line)


@pytest.mark.parametrize(
    "line, coefficient",
    [
        ("", 0.1),
        ("--kl_controller adaptive", 0.2),
        ("--kl_controller adaptive --kl_coef 0.1", 0.1),
        ("--kl_coef 0", 0.0),
    ],
)
def test_the_first_kl_coefficient_depends_on_the_controller(line, coefficient):
    assert read(PPOConfig, MODELS + line).first_kl_coef == coefficient


@pytest.mark.parametrize("line", ["", "--num_warmup_steps 0"])
def test_a_schedule_without_a_warm_up_takes_the_default_and_none(line):
    assert read(PPOConfig, MODELS + "--lr_scheduler_type constant " + line).lr_scheduler_type == "constant"
    assert read(PPOConfig, MODELS).num_warmup_steps == 100 and read(SFTConfig).num_warmup_steps == 0


def test_checks_hold_for_configs_made_in_python():
    with pytest.raises(UserError, match="--seed"):
        SFTConfig(seed=-1).validate()
    SFTConfig(data_split="0,1,1", sft_only_data_path=("a",)).validate()


def test_step_3_names_the_program_that_makes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "step1_sft/main.py" in message(PPOConfig, "")
    made = [tmp_path / config.output_dir for config in (SFTConfig(), RewardConfig())]
    for directory, missing in zip(made, ("step1_sft/main.py", "step2_reward/main.py")):
        (directory / "checkpoints").mkdir(parents=True)  # of a run that was interrupted
        assert missing in message(PPOConfig, "")
        (directory / "config.json").write_text("{}")
    assert read(PPOConfig) == PPOConfig()


def test_an_output_directory_that_is_a_file(tmp_path):
    path = tmp_path / "result"
    path.write_text("")
    assert "is a file" in message(SFTConfig, f"--output_dir {path}")


@pytest.mark.parametrize("path", ["/proc/result", "n" * 300])
def test_an_output_directory_that_cannot_be_made(path):
    assert "cannot be written to" in message(SFTConfig, f"--output_dir {path}")


def test_options_without_effect_are_told_once_and_change_nothing(tmp_path):
    old = recipe(tmp_path / "r.yaml", "enable_hybrid_engine: true\ninference_tp_size: 2\n")
    config = read(PPOConfig, MODELS + old + "--inference_tp_size 4 --deepspeed --local_rank=1")
    assert len(config.notes) == 2
    assert f"{tmp_path / 'r.yaml'}:1: enable_hybrid_engine has no effect: " in config.notes[0]
    assert config.notes[1].startswith("--inference_tp_size has no effect: ")
    assert config == read(PPOConfig, MODELS)
    assert read(PPOConfig, MODELS).notes == ()
