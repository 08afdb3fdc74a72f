"""Rollouts between training steps, at every ZeRO stage, full and LoRA; writes down tokens and changed weights.

Run under the launcher: generation_cases.py [--long] CACHE_DIR OUTPUT_DIR. Rank 0 writes RANKS.json: for each case the
rollout of all ranks, the plain way's tokens, what the sampler recorded against the model's own pass, and whether
weights and training came through bit for bit; `shared`, what `shared_models` found at each stage; `one_prompt`,
rollouts in which only one rank has a prompt; and `threads`, those that rank 0 computes with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from datasets import Dataset

from common.artifacts.export import full_state_dict
from common.batching.collate import collate_prompts, unmasked
from common.batching.sampler import evaluation_batches
from common.data.tokenization import load_tokenizer, make_codec
from common.models.loading import load_causal_lm
from common.models.logprobs import response_log_probs
from common.models.quantization import quantized_layers
from common.runtime.distributed import device, is_main, on_every_rank, rank, world_size
from common.runtime.program import run_program, start
from common.training.engine import EngineSettings, OptimizerSettings, deepspeed_config, resolve_dtype, training_engine
from step3_ppo.diagnostics import sampler_gap
from step3_ppo.generation.actor_rollouts import ActorRollouts
from step3_ppo.generation.optimizer_offload import OptimizerOffload
from step3_ppo.generation.rollout import Rollout
from step3_ppo.generation.sampling import Sampling
from step3_ppo.sharing import share_rollout
from tests.architectures import build_model
from tests.distributed.gradient_cases import ROWS, one_step, rows, with_lora
from tests.distributed.shared_models import shared_models
from tests.distributed.variants import DEEPSPEED, DEEPSPEED_QUANTIZED, GENERATION, GENERATION_AT_LENGTH
from tests.supervised import sft_trainer

PROMPTS = 10  # not a multiple of ranks and slots
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=16)
EXACT = Sampling(temperature=0.8, top_p=0.7, top_k=0, min_new_tokens=3, max_new_tokens=16, exact=True)


def main() -> None:
    cache_dir, output_dir = (Path(word) for word in sys.argv[1:] if not word.startswith("--"))
    model_dir = output_dir / f"model-{world_size()}-{rank()}"
    build_model("opt", model_dir, cache_dir)
    start(120, seed=0)
    codec = make_codec(load_tokenizer(str(model_dir)), "human_assistant")
    cases, stages = GENERATION, (0, 2, 3)
    if "--long" in sys.argv:
        cases, stages = cases | GENERATION_AT_LENGTH, (0, 1, 2, 3)
    found = {name: case(str(model_dir), codec, *settings) for name, settings in cases.items()}
    found["shared"] = {stage: shared_models(str(model_dir), codec, stage) for stage in stages}
    found["one_prompt"] = {stage: one_prompt(str(model_dir), codec, stage) for stage in (0, 3)}
    found["threads"] = torch.get_num_threads()
    if is_main():
        (output_dir / f"{world_size()}.json").write_text(json.dumps(found))


def case(model: str, codec, stage: int, lora: bool, dtype: str, quantize: str = "none") -> dict:
    """Two training steps with rollouts before, between and after, optimizer states away meanwhile; and with none."""
    weights, texts, gaps, unmoved, emptied = {}, {}, {}, [], []
    for rolling in (True, False):
        engine = build(model, codec, stage, lora, dtype, quantize)
        trainer = sft_trainer(engine, rows(["prompt_ids", "response_ids"]), codec.pad_id)
        for step in range(3):
            if rolling:
                before = full_state_dict(engine)
                states = OptimizerOffload([engine])
                with states.offloaded():
                    emptied.append((states.copies or not step) and not any(map(len, states.storages())))
                    texts[step] = {way: roll_out(engine, codec, way) for way in ("fast", "plain")}
                    if step == 1:
                        gaps = {way: largest_gaps(engine, codec, way) for way in ("fast", "plain")}
                after = full_state_dict(engine)
                unmoved.append(not is_main() or all(torch.equal(after[name], before[name]) for name in before))
            if step < 2:
                trainer.train_step(one_step(trainer.train["length"], ROWS // 2))
        weights[rolling] = full_state_dict(engine)
        released = [not layer.weight.numel() for layer in quantized_layers(engine.module)]
        engine.destroy()
    same = not is_main() or all(torch.equal(weights[True][name], weights[False][name]) for name in weights[True])
    return {
        "rollouts": texts,
        "gaps": gaps,
        "weights_unmoved": all(unmoved),
        "training_unmoved": same,
        "states_away": all(emptied),
        "quantised_weights_released": released,
    }


@torch.no_grad()
def largest_gaps(engine, codec, way: str) -> list[float]:
    """Between what the sampler recorded and the engine's own pass: of the whole policy, and of the kept tokens."""
    found = []
    for sampling in (SAMPLING, EXACT):
        rollout = whole_rollout(engine, codec, way, PROMPTS, sampling).to(device())
        engine.eval()
        lengths = rollout.prompt_lengths, rollout.response_lengths
        old = response_log_probs(engine, unmasked(rollout.tokens), *lengths, sampling.temperature, rollout.kept)
        engine.train()
        found.append(sampler_gap(rollout.sampling_log_probs, old, rollout.response_mask)["sampler_gap_max"])
    return found


def one_prompt(model: str, codec, stage: int) -> list[list[list[int]]]:
    """Rollouts of one prompt over all ranks: before the engine's first forward pass, and after a training step."""
    engine = build(model, codec, stage, lora=False, dtype="fp32")
    trainer = sft_trainer(engine, rows(["prompt_ids", "response_ids"]), codec.pad_id)
    texts = [roll_out(engine, codec, "fast", prompts=1)]
    trainer.train_step(one_step(trainer.train["length"], ROWS // 2))
    texts.append(roll_out(engine, codec, "fast", prompts=1))
    engine.destroy()
    return texts


def build(model: str, codec, stage: int, lora: bool, dtype: str, quantize: str = "none"):
    override = DEEPSPEED if quantize == "none" else DEEPSPEED_QUANTIZED
    settings = EngineSettings(stage, resolve_dtype(dtype), ROWS, override=override, quantize=quantize)
    network = load_causal_lm(
        model,
        codec,
        dtype=settings.dtype,
        dropout=0.0,
        ds_config=deepspeed_config(settings),
        gradient_checkpointing=True,
        quantize=quantize,
    )
    return training_engine(
        with_lora(network) if lora else network, settings, OptimizerSettings(1e-2, 1e-2, 0.0, "constant", 0, 10)
    )


def roll_out(engine, codec, way: str, prompts: int = PROMPTS) -> list[list[int]]:
    """The tokens of `whole_rollout`."""
    whole = whole_rollout(engine, codec, way, prompts, SAMPLING)
    return [
        whole.tokens[row, start:end].tolist()
        for row, (start, end) in enumerate(zip(whole.prompt_lengths.tolist(), whole.lengths.tolist()))
    ]


def whole_rollout(engine, codec, way: str, prompts: int, sampling: Sampling) -> Rollout:
    """The responses to all prompts, over all ranks; the plain way where generation mode is forbidden."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(10, 200, (2 + 5 * number % 13,), generator=generator).tolist() for number in range(prompts)]
    dataset = Dataset.from_dict({"prompt_ids": ids})
    (batch,) = evaluation_batches([len(row) for row in ids], -(-prompts // world_size()), world_size(), rank())
    rollouts = ActorRollouts(engine, slots=3, seed=7, end_ids=codec.end_ids, pad_id=codec.pad_id)
    if way == "plain":
        mine = [
            rollouts._plainly(part, sampling, 1, lambda finished: None, synced=True)
            for part in collate_prompts(dataset, batch, codec.pad_id).split(3)
        ]
        whole = share_rollout(type(mine[0]).concat(mine))
    else:
        whole = share_rollout(rollouts.roll_out(collate_prompts(dataset, batch, codec.pad_id), sampling, 1))
    assert on_every_rank(len(whole.tokens) == prompts)
    return whole


if __name__ == "__main__":
    sys.exit(run_program(main))
