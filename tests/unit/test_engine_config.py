"""The DeepSpeed configuration: what the flags decide, and what a JSON file may lay over it."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from common.config.groups import SCHEDULES
from common.config.parser import Config, options
from common.errors import UserError
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    check_engine_options,
    deepspeed_config,
    resolve_dtype,
)
from common.training.optim import WeightChanges, build_scheduler, parameter_groups
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig


def written(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_is_laid_over_the_generated_configuration_section_by_section(tmp_path):
    path = written(
        tmp_path / "ds.json", {"zero_optimization": {"reduce_bucket_size": 1234}, "wall_clock_breakdown": True}
    )
    generated = deepspeed_config(EngineSettings(2, torch.bfloat16, 4))
    merged = deepspeed_config(EngineSettings(2, torch.bfloat16, 4, override=path))
    assert merged["zero_optimization"] == {**generated["zero_optimization"], "reduce_bucket_size": 1234}
    assert merged["wall_clock_breakdown"] is True and merged["bf16"] == {"enabled": True}


def test_the_engine_of_a_quantised_model_has_no_weights_in_half_precision():
    """Its layers compute in bf16 by themselves; adapters, norms and heads are fp32."""
    generated = deepspeed_config(EngineSettings(2, torch.bfloat16, 4, quantize="nf4"))
    assert generated == deepspeed_config(EngineSettings(2, torch.float32, 4))


@pytest.mark.parametrize(
    "config, flag",
    [
        (SFTConfig(quantize="nf4", lora_dim=4), "--quantize nf4"),
        (PPOConfig(actor_quantize="int8", actor_lora_dim=4), "--actor_quantize int8"),
        (PPOConfig(reward_quantize="nf4"), "--reward_quantize nf4"),
    ],
)
def test_without_bitsandbytes_the_flag_that_needs_it_is_refused(config, flag, monkeypatch):
    check_engine_options(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"{flag}: the package bitsandbytes is not installed: pip ")):
        check_engine_options(config)


@pytest.mark.parametrize(
    "content, said",
    [
        ({"gradient_accumulation_steps": 8}, "--gradient_accumulation_steps"),
        ({"zero_optimization": {"stage": 2}}, "--zero_stage"),
        ({"bf16": {"enabled": True}}, "--dtype"),
        ({"optimizer": {"type": "Adam"}}, "--learning_rate"),
        ({"gradient_clipping": 0.5}, "--max_grad_norm"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size"),
        ("[1, 2]", "one JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_what_a_flag_decides_is_refused_in_the_file(tmp_path, content, said):
    with pytest.raises(UserError, match="--deepspeed_config .*") as error:
        check_engine_options(SFTConfig(deepspeed_config=written(tmp_path / "ds.json", content)))
    assert said in str(error.value)


@pytest.mark.parametrize("cls", (SFTConfig, RewardConfig, PPOConfig))
def test_every_step_names_the_flags_that_decide_a_key(tmp_path, cls: type[Config]):
    keys = [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "managed_gradient_accumulation",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "zero_optimization.stage",
        "fp16.enabled",
        "bf16.enabled",
    ]
    for key in keys:
        section, _, name = key.partition(".")
        path = written(tmp_path / "ds.json", {section: {name: 1} if name else 1})
        with pytest.raises(UserError, match=f"^--deepspeed_config {path}: leave out {key}; --.* that$") as error:
            check_engine_options(cls(deepspeed_config=path))
        named = {word.removeprefix("--") for word in str(error.value).split(";")[1].split() if word.startswith("--")}
        assert named and named <= set(options(cls))
    if cls is PPOConfig:
        path = written(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
        with pytest.raises(UserError, match="--actor_zero_stage and --critic_zero_stage decide that"):
            check_engine_options(cls(deepspeed_config=path))


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_frozen_model_is_whole_or_partitioned(stage):
    settings = EngineSettings(stage, torch.float32, 1)
    assert deepspeed_config(settings, trainable=False)["zero_optimization"]["stage"] == (3 if stage == 3 else 0)
    assert deepspeed_config(settings)["zero_optimization"]["stage"] == stage


def test_fp16_is_never_trained_where_its_loss_is_not_scaled():
    assert deepspeed_config(EngineSettings(0, torch.float16, 1))["zero_optimization"]["stage"] == 1
    assert deepspeed_config(EngineSettings(0, torch.float16, 1), trainable=False)["zero_optimization"]["stage"] == 0


def test_offloading_moves_what_there_is_to_move():
    zero = lambda stage, trainable: deepspeed_config(EngineSettings(stage, torch.float32, 1, offload=True), trainable)[
        "zero_optimization"
    ]
    assert "offload_optimizer" not in zero(0, True)
    assert "offload_optimizer" in zero(2, True) and "offload_param" not in zero(2, True)
    assert "offload_optimizer" in zero(3, True) and "offload_param" in zero(3, True)
    assert "offload_optimizer" not in zero(3, False) and "offload_param" in zero(3, False)


def test_dtype_auto_suits_the_machine():
    assert resolve_dtype("auto") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert resolve_dtype("bf16") == torch.bfloat16


def test_adapters_have_their_own_rate_and_vectors_no_decay():
    module = nn.ModuleDict({"lora_A": nn.Linear(4, 4), "head": nn.Linear(4, 4), "frozen": nn.Linear(4, 4)})
    module["frozen"].requires_grad_(False)
    groups = parameter_groups(module, 1e-4, 0.1, lora_learning_rate=1e-2)
    found = {(group["lr"], group["weight_decay"]): [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {(1e-2, 0.1): [(4, 4)], (1e-2, 0.0): [(4,)], (1e-4, 0.1): [(4, 4)], (1e-4, 0.0): [(4,)]}


def rates_of(schedule: str, warmup: int, total: int) -> list[float]:
    """The learning rates of a run whose highest is 1, and the one after it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, schedule, warmup_steps=warmup, total_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_a_schedule_ends_at_zero_after_the_last_step():
    *rates, after = rates_of("cosine", 5, 20)
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]) and 0 < rates[-1] < 0.05 and after == 0
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_takes_every_warm_up(schedule):
    for total in (1, 2, 6):
        for warmup in (0, 1, total - 1, total, total + 1, 100):
            *rates, after = rates_of(schedule, warmup, total)
            assert len(rates) == total and min(rates) > 0 and max(rates) == 1.0 and after >= 0
            if schedule != "constant":
                rising = min(warmup, total)
                assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_warm_up_a_schedule_is_that_of_transformers(schedule):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # at its default rate: polynomial measures in that
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"])
        optimizer.step(), theirs.step()
    assert rates_of(schedule, 4, 20)[4:-1] == pytest.approx(expected[4:])


@pytest.mark.parametrize(
    "steps, printed",
    [
        (
            6,
            [
                "note: --num_warmup_steps 100 is shortened to the 6 optimizer steps that this run has, so the learning "
                "rate rises to its end"
            ],
        ),
        (100, []),
        (101, []),
    ],
)
def test_a_run_shorter_than_its_warm_up_says_so(steps, printed, capsys):
    config = SFTConfig(num_warmup_steps=100)
    assert OptimizerSettings.from_config(config, steps).total_steps == steps
    assert capsys.readouterr().out.splitlines() == printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_change_of_a_trained_weight_is_seen(dtype):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    module[0].requires_grad_(False)
    changes = WeightChanges(module)
    with torch.no_grad():
        module[0].weight.add_(1)  # is not trained
        assert changes.none()
        module[1].bias[0] = torch.nextafter(module[1].bias[0].float(), torch.tensor(9.0)).to(dtype)
        assert changes.none() is (dtype != torch.float32)  # too small to show in half precision
        module[1].bias[0] += 0.01
    assert not changes.none()
