"""One optimizer step of every trainer, cut up in many ways; what Adam saw is written down for comparison.

Run under the launcher: gradient_cases.py CACHE_DIR OUTPUT_DIR. After one step from fresh state Adam's first moment
is (1 - beta1) times the gradient, at any ZeRO stage, with the reduction over ranks and micro-batches already done.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from datasets import Dataset
from safetensors.torch import save_file

from common.data.sampler import StepSampler
from common.data.tokenization import load_tokenizer, make_codec
from common.distributed import is_main, rank, run_program, start, world_size
from common.engine import EngineSettings, OptimizerSettings, deepspeed_config, training_engine
from common.lora import add_lora
from common.models.factory import load_causal_lm, load_scalar_model
from common.optim import BETAS
from step1_sft.trainer import SFTTrainer
from step2_reward.trainer import RewardTrainer
from tests.architectures import build_model

ROWS = 8  # of one optimizer step, over all ranks and micro-batches

# name -> ZeRO stage, rows per micro-batch over all ranks, gradient checkpointing, LoRA
VARIANTS = {
    "whole": (0, 8, False, False), "accumulated": (0, 2, False, False), "checkpointed": (0, 8, True, False),
    "zero1": (1, 4, False, False), "zero2": (2, 4, False, False), "zero3": (3, 4, False, False),
    "zero3-checkpointed": (3, 8, True, False),
    "lora": (0, 8, False, True), "lora-zero2": (2, 4, True, True), "lora-zero3": (3, 4, False, True),
}


def main(argv) -> None:
    # The launcher adds --local_rank=N.
    cache_dir, output_dir = (Path(word) for word in sys.argv[1:] if not word.startswith("--"))
    model_dir = output_dir / f"model-{world_size()}-{rank()}"
    build_model("opt", model_dir, cache_dir)
    start(120)
    codec = make_codec(load_tokenizer(str(model_dir)), "human_assistant")
    for name, variant in VARIANTS.items():
        for trainer_of in (sft_trainer, reward_trainer):
            trainer = trainer_of(str(model_dir), codec, *variant)
            step_on_all_rows(trainer, variant[1])
            gradients = first_step_gradients(trainer.engine)
            if is_main():
                save_file(gradients, output_dir / f"{trainer_of.__name__}.{world_size()}.{name}.safetensors")
            trainer.engine.destroy()


def rows(columns: list[str]) -> Dataset:
    """Rows of very unequal lengths, so that a mean of means would differ from the mean."""
    generator = torch.Generator().manual_seed(5)
    data = {column: [torch.randint(10, 200, (2 + 3 * ((row + shift) % ROWS),), generator=generator).tolist()
                     for row in range(ROWS)] for shift, column in enumerate(columns)}
    data["length"] = [sum(len(data[column][row]) for column in columns) for row in range(ROWS)]
    return Dataset.from_dict(data)


def settings(stage: int) -> tuple[EngineSettings, OptimizerSettings]:
    return (EngineSettings(stage, torch.float32, ROWS),
            OptimizerSettings(1e-4, 1e-4, 0.0, "constant", 0, 10))


def sft_trainer(model: str, codec, stage: int, _rows: int, checkpointing: bool, lora: bool) -> SFTTrainer:
    engine_settings, optimizer = settings(stage)
    network = load_causal_lm(model, "--model", codec, dtype=torch.float32, dropout=0.0,
                             ds_config=deepspeed_config(engine_settings), gradient_checkpointing=checkpointing)
    engine = training_engine(with_lora(network) if lora else network, engine_settings, optimizer)
    return SFTTrainer(engine, rows(["prompt_ids", "response_ids"]), None, [], codec.pad_id, train_on_prompt=False)


def reward_trainer(model: str, codec, stage: int, _rows: int, checkpointing: bool, lora: bool) -> RewardTrainer:
    engine_settings, optimizer = settings(stage)
    network = load_scalar_model(model, "--model", codec, dtype=torch.float32, dropout=0.0, seed=3,
                                ds_config=deepspeed_config(engine_settings), gradient_checkpointing=checkpointing)
    if lora:
        with_lora(network.classifier)
    engine = training_engine(network, engine_settings, optimizer)
    return RewardTrainer(engine, rows(["prompt_ids", "chosen_ids", "rejected_ids"]), None, [], codec.pad_id,
                         margin=0.5, centring=0.1)


def with_lora(model):
    torch.manual_seed(11)
    add_lora(model, dim=4, alpha=8, dropout=0.0, modules="auto", flag="--lora_module_name", base_name="base")
    generator = torch.Generator().manual_seed(12)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at 0, which would hide every gradient of A
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step_on_all_rows(trainer, global_micro_batch: int) -> None:
    sampler = StepSampler(trainer.train["length"], rows_per_micro_batch=global_micro_batch // world_size(),
                          micro_batches_per_step=ROWS // global_micro_batch, world_size=world_size(), rank=rank(),
                          seed=0)
    (micro_batches,) = sampler.epoch(0)
    trainer.engine.train()
    trainer.train_step(micro_batches)


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
    code = run_program(main)
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(0)
