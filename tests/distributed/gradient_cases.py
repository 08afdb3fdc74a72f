"""One optimizer step of every trainer, with many micro-batch layouts; writes down the gradients that Adam gets.

Run under the launcher: gradient_cases.py [--long] CACHE_DIR OUTPUT_DIR. After one step from fresh state Adam's first
moment is (1 - beta1) times the gradient, at any ZeRO stage, with the reduction over ranks and micro-batches already
done.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file

from alternatives.dpo.config import DPOConfig
from alternatives.dpo.kto_task import KTOTask
from alternatives.dpo.mismatched import with_mismatched
from alternatives.dpo.reference import with_reference
from alternatives.dpo.task import DPOTask
from common.artifacts.export import full_state_dict
from common.batching.sampler import StepSampler
from common.data.tokenization import load_tokenizer, make_codec
from common.models import logprobs
from common.models.calibration import RAW
from common.models.loading import load_causal_lm, load_scoring_model
from common.models.lora import add_lora
from common.runtime.distributed import is_main, rank, world_size
from common.runtime.program import run_program, start
from common.training.engine import EngineSettings, OptimizerSettings, deepspeed_config, training_engine
from common.training.optim import BETAS
from step2_reward.config import RewardConfig
from step2_reward.task import RewardTask
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import PPOModels
from step3_ppo.reward import TokenRewardModel
from step3_ppo.schedule import text_batches
from step3_ppo.scoring import ModelOutputs
from step3_ppo.trainer import PPOTrainer
from tests.architectures import build_encoder, build_model
from tests.distributed.variants import DEEPSPEED, LOSSES_IN, TRUNCATED, VARIANTS, VARIANTS_AT_LENGTH, Tokens
from tests.supervised import reward_trainer, sft_trainer, trainer_of

WHOLE = logprobs.CHUNK_NUMBERS
ROWS = 8  # of one optimizer step, over all ranks and micro-batches


def main() -> None:
    # The launcher adds --local_rank=N.
    cache_dir, output_dir = (Path(word) for word in sys.argv[1:] if not word.startswith("--"))
    model_dir = output_dir / f"model-{world_size()}-{rank()}"
    build_model("opt", model_dir, cache_dir)
    encoder_dir = build_encoder("deberta-v3", output_dir / f"encoder-{world_size()}-{rank()}")
    start(120, seed=0)
    codec, encoder_codec = (
        make_codec(load_tokenizer(str(directory)), "human_assistant") for directory in (model_dir, encoder_dir)
    )
    variants = VARIANTS | VARIANTS_AT_LENGTH if "--long" in sys.argv else VARIANTS
    for name, variant in variants.items():
        # The others are compared with these two: what one chunk of the output head says, many must say.
        logprobs.CHUNK_NUMBERS = WHOLE if name in ("whole", "lora") else 7 * len(codec.tokenizer)
        steps = [sft_step, reward_step, encoder_step, dpo_step, kto_step, ppo_step]
        steps += [gspo_step, cispo_step] if name in LOSSES_IN else []
        steps += [truncated_ppo_step] if name in TRUNCATED else []
        for step in steps:
            model = (str(encoder_dir), encoder_codec) if step is encoder_step else (str(model_dir), codec)
            engines = step(*model, *variant)
            gradients = {
                f"{number}.{parameter}": gradient
                for number, engine in enumerate(engines)
                for parameter, gradient in first_step_gradients(engine).items()
            }
            if is_main():
                save_file(gradients, output_dir / f"{step.__name__}.{world_size()}.{name}.safetensors")
            for engine in engines:
                engine.destroy()
    for stage in (0, 2, 3):
        updates = bf16_update(str(model_dir), codec, stage)
        if is_main():
            save_file(updates, output_dir / f"bf16.{world_size()}.zero{stage}.safetensors")


def bf16_update(model: str, codec, stage: int) -> dict[str, torch.Tensor]:
    """What two optimizer steps in bf16 change; large ones, which bf16's own rounding does not blur. On rank 0."""
    settings_ = EngineSettings(stage, torch.bfloat16, ROWS, override=DEEPSPEED)
    optimizer = OptimizerSettings(1e-2, 1e-2, 0.0, "constant", 0, 10)
    network = load_causal_lm(model, codec, dtype=torch.bfloat16, dropout=0.0, ds_config=deepspeed_config(settings_))
    engine = training_engine(network, settings_, optimizer)
    weights = lambda: {name: value.float() for name, value in (full_state_dict(engine) or {}).items()}
    before = weights()
    trainer = sft_trainer(engine, rows(["prompt_ids", "response_ids"]), codec.pad_id)
    for _ in range(2):
        trainer.train_step(one_step(trainer.train["length"], ROWS))
    updates = {name: value - before[name] for name, value in weights().items()}
    engine.destroy()
    return updates


def rows(columns: list[str]) -> Dataset:
    """Rows of very unequal lengths, so that a mean of means would differ from the mean."""
    generator = torch.Generator().manual_seed(5)
    data = {
        column: [
            torch.randint(10, 200, (2 + 3 * ((row + shift) % ROWS),), generator=generator).tolist()
            for row in range(ROWS)
        ]
        for shift, column in enumerate(columns)
    }
    data["length"] = [sum(len(data[column][row]) for column in columns) for row in range(ROWS)]
    return Dataset.from_dict(data)


def settings(stage: int, offload: bool) -> tuple[EngineSettings, OptimizerSettings]:
    return (
        EngineSettings(stage, torch.float32, ROWS, offload, override=DEEPSPEED),
        OptimizerSettings(1e-4, 1e-4, 0.0, "constant", 0, 10),
    )


def sft_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    trainer = sft_trainer(actor(model, codec, stage, *held), rows(["prompt_ids", "response_ids"]), codec.pad_id)
    trainer.train_step(one_step(trainer.train["length"], micro_batch))
    return [trainer.engine]


def reward_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    trainer = reward_trainer(
        critic(model, codec, stage, *held), rows(["prompt_ids", "chosen_ids", "rejected_ids"]), codec.pad_id
    )
    trainer.train_step(one_step([2 * length for length in trainer.train["length"]], micro_batch))
    return [trainer.engine]


def encoder_step(model: str, codec, *variant) -> list:
    """A step of an encoder as the reward model, each pair with a margin of its own."""
    pairs = rows(["prompt_ids", "chosen_ids", "rejected_ids"])
    pairs = pairs.add_column("margin", [0.25 * row for row in range(ROWS)])
    config = RewardConfig(margin_column="margin", centring_coef=0.1)
    stage, micro_batch, *held = variant
    trainer = trainer_of(RewardTask(config), critic(model, codec, stage, *held), pairs, codec.pad_id)
    trainer.train_step(one_step([2 * length for length in trainer.train["length"]], micro_batch))
    return [trainer.engine]


def dpo_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    """Pairs with random log-probs of the reference; the SFT term is a mean over each chosen response."""
    pairs = rows(["prompt_ids", "chosen_ids", "rejected_ids"])
    pairs = with_reference(pairs, np.random.default_rng(4).normal(-40.0, 10.0, (ROWS, 2)).astype(np.float32))
    task = DPOTask(DPOConfig(sft_coef=0.2))
    trainer = trainer_of(task, actor(model, codec, stage, *held), pairs, codec.pad_id)
    trainer.train_step(one_step([2 * length for length in trainer.train["length"]], micro_batch))
    return [trainer.engine]


def kto_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    """The reference gives tokens about a third of the probability that the model does, so that z_0 is above 0."""
    marked = rows(["prompt_ids", "response_ids"]).add_column("dialogue", [0, 0, 1, 1, 2, 3, 3, 3])
    marked = with_mismatched(marked.add_column("desirable", [row % 3 == 0 for row in range(ROWS)]), 64, "rows")
    tokens = np.array([len(response) for response in marked["response_ids"]])
    both = np.stack([tokens, tokens[marked["mismatched"]]], 1)
    reference = -(np.log(len(codec.tokenizer)) + 1) * both + np.random.default_rng(4).normal(0, 3.0, (ROWS, 2))
    marked = with_reference(marked, reference.astype(np.float32))
    task = KTOTask(DPOConfig(loss_type="kto", desirable_weight=1.5, undesirable_weight=0.7))
    trainer = trainer_of(task, actor(model, codec, stage, *held), marked, codec.pad_id)
    trainer.train_step(one_step(list(trainer.train["length"]), micro_batch))
    assert task.baseline > 1, "z_0 is clamped, so nothing of it is seen"
    return [trainer.engine]


def ppo_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    trainer = whole_ppo_trainer(model, codec, stage, micro_batch, *held)
    trainer.update(experience(), 0)
    return list(trainer.models.trained().values())


def truncated_ppo_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    """As `ppo_step`, with three responses that were cut by length and are left out."""
    trainer = whole_ppo_trainer(model, codec, stage, micro_batch, *held, mask_truncated_answers=True)
    whole = experience()
    rollout = replace(whole.rollout, finished=torch.tensor([True, False, True, True, False, True, True, False]))
    outputs = ModelOutputs(
        whole.old_log_probs, whole.ref_log_probs, torch.zeros_like(whole.values), whole.values, torch.zeros(ROWS)
    )
    trainer.update(trainer.experience(rollout, outputs, whole.advantages, None), 0)
    return list(trainer.models.trained().values())


def gspo_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    """The mean over responses of each one's mean, KL among it."""
    config = ppo_config(micro_batch, advantage="grpo", answers_per_prompt=2, policy_loss="gspo", clip_range=0.5)
    return updated_without_critic(config, actor(model, codec, stage, *held), codec)


def cispo_step(model: str, codec, stage: int, micro_batch: int, *held: bool) -> list:
    """The sum over tokens by a constant length."""
    config = ppo_config(
        micro_batch,
        advantage="dr_grpo",
        answers_per_prompt=2,
        policy_loss="cispo",
        loss_aggregation="constant",
        max_answer_seq_len=20,
    )
    return updated_without_critic(config, actor(model, codec, stage, *held), codec)


def whole_ppo_trainer(model: str, codec, stage: int, micro_batch: int, *held: bool, **options) -> PPOTrainer:
    """With a critic and plain text."""
    config = ppo_config(micro_batch, unsup_coef=0.5, **options)
    texts = text_batches(config, rows(["input_ids"]), codec)
    return ppo_trainer(config, actor(model, codec, stage, *held), critic(model, codec, stage, *held), codec, texts)


def ppo_config(micro_batch: int, **options) -> PPOConfig:
    rows_per_rank, accumulation, max_tokens = cut(micro_batch)
    return PPOConfig(
        per_device_training_batch_size=rows_per_rank,
        kl_placement="loss",
        kl_coef=0.5,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=max_tokens,
        **options,
    )


def updated_without_critic(config: PPOConfig, actor_, codec) -> list:
    """The actor's engine after one update from an experience without values."""
    trainer = ppo_trainer(config, actor_, None, codec, None)
    trainer.update(replace(experience(), values=None, returns=None), 0)
    return [actor_]


def ppo_trainer(config: PPOConfig, actor_, critic_, codec, texts) -> PPOTrainer:
    models = PPOModels(actor_, critic_, None, None, None, temperature=0.9)
    reward = TokenRewardModel(models, config)
    return PPOTrainer(models, reward, config, codec, None, texts, ScoreScale(RAW))


def actor(model: str, codec, stage: int, checkpointing: bool, lora: bool, offload: bool):
    engine_settings, optimizer = settings(stage, offload)
    network = load_causal_lm(
        model,
        codec,
        dtype=torch.float32,
        dropout=0.0,
        ds_config=deepspeed_config(engine_settings),
        gradient_checkpointing=checkpointing,
    )
    return training_engine(with_lora(network) if lora else network, engine_settings, optimizer)


def critic(model: str, codec, stage: int, checkpointing: bool, lora: bool, offload: bool):
    engine_settings, optimizer = settings(stage, offload)
    network = load_scoring_model(
        model,
        codec,
        dtype=torch.float32,
        dropout=0.0,
        seed=3,
        ds_config=deepspeed_config(engine_settings),
        gradient_checkpointing=checkpointing,
    )
    if lora:
        with_lora(network.classifier)
    return training_engine(network, engine_settings, optimizer)


def one_step(lengths: list[int], micro_batch: int) -> list:
    """This rank's micro-batches of a step over all rows."""
    rows_per_rank, accumulation, max_tokens = cut(micro_batch)
    sampler = StepSampler(
        lengths,
        rows_per_micro_batch=rows_per_rank,
        micro_batches_per_step=accumulation,
        world_size=world_size(),
        rank=rank(),
        seed=0,
        max_tokens=max_tokens,
    )
    (micro_batches,) = sampler.epoch(0)
    return micro_batches


def cut(micro_batch: int) -> tuple[int, int, int]:
    """Rows of a micro-batch on one rank, micro-batches and, for a variant that counts them, tokens."""
    rows_, max_tokens = (ROWS, int(micro_batch)) if isinstance(micro_batch, Tokens) else (micro_batch, 0)
    return rows_ // world_size(), ROWS // rows_, max_tokens


def experience() -> Experience:
    """Random responses of very unequal lengths with random advantages."""
    generator = torch.Generator().manual_seed(9)
    responses = torch.tensor([1, 17, 4, 9, 2, 13, 6, 11])
    prompts = torch.tensor([5, 2, 12, 3, 8, 4, 9, 1])
    noise = lambda scale: torch.randn(ROWS, int(responses.max()), generator=generator) * scale
    rollout = Rollout(
        torch.randint(10, 200, (ROWS, int((prompts + responses).max())), generator=generator),
        prompts,
        responses,
        torch.ones(ROWS, dtype=torch.bool),
        torch.arange(ROWS),
        torch.ones(ROWS, dtype=torch.bool),
        torch.zeros(ROWS, dtype=torch.long),
    )
    return Experience(
        rollout,
        old_log_probs=-6 + noise(0.1),
        ref_log_probs=-6 + noise(1.0),
        values=noise(1.0),
        advantages=noise(1.0),
        returns=noise(1.0),
    )


def with_lora(model):
    add_lora(model, dim=4, alpha=8, dropout=0.0, modules="auto", base_name="base", seed=0)
    generator = torch.Generator().manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at 0, which would hide every gradient of A
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def first_step_gradients(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    gradients = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization():
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = engine.optimizer.state[parameter]["exp_avg"]
        gradients[name] = (moment / (1 - BETAS[0])).float().contiguous().clone()
    return gradients


if __name__ == "__main__":
    sys.exit(run_program(main))
