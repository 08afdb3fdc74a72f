"""Compares rollouts by continuous batching with `generate` and a cache. --help lists the options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch

from benchmarks.inputs import BenchmarkOptions, random_model, with_data
from benchmarks.measure import Outcome, compare, counted_positions
from benchmarks.plain import LongTail, cached_generate, generate_batch, same_responses
from common.artifacts.compatibility import open_codec
from common.artifacts.split_rule import data_request
from common.artifacts.tracking import quiet_libraries
from common.batching.collate import collate_prompts
from common.batching.sampler import MicroBatch
from common.config.parser import PathName, option, parse
from common.data.prepare import prepare
from common.errors import UserError, named_by
from common.models.loading import load_causal_lm
from common.models.lora import add_lora
from common.runtime.distributed import device, global_sum, rank, world_size
from common.runtime.program import run_program, start
from common.training.engine import EngineSettings, OptimizerSettings, deepspeed_config, resolve_dtype, training_engine
from step3_ppo.config import PPOConfig
from step3_ppo.generation.continuous_batching import Decoder, Request
from step3_ppo.generation.generation_mode import generation_mode
from step3_ppo.generation.sampling import response_limits, uniforms


@dataclass(frozen=True, kw_only=True)
class RolloutBenchmark(BenchmarkOptions, PPOConfig):
    """Rollouts of one model, by the options of step 3"""

    actor_model_name_or_path: PathName = option("random:opt-4x256", "the model that writes")
    actor_zero_stage: int = option(0, "ZeRO stage", choices=(0, 1, 2, 3))
    per_device_generation_batch_size: int = option(64, "responses per rank at a time", low=1)
    max_answer_seq_len: int = option(128, "longest response; the mean is a third of it", unit="tokens", low=1)
    prompts: int = option(256, "prompts over all ranks", low=1)
    greedy: bool = option(False, "take the likeliest token, in place of a sampled one")
    against: str = option(
        "generate",
        "transformers' standard way, or its continuous batching (greedy, ZeRO 0)",
        choices=("generate", "generate_batch"),
    )
    critic_model_name_or_path: PathName = option("none", "", ignored="no reward model takes part")


def main(argv=None) -> None:
    """Both variants respond to the same prompts with the same random numbers and imposed lengths."""
    config = with_data(parse(RolloutBenchmark, argv))
    if config.against == "generate_batch" and not (config.greedy and config.actor_zero_stage == 0):
        raise UserError(
            "--against generate_batch draws from random numbers of its own and knows no ZeRO-3: add "
            "--greedy --actor_zero_stage 0"
        )
    if config.prompts % world_size():
        raise UserError(f"--prompts {config.prompts}: must be a multiple of the {world_size()} ranks")
    source = random_model(config.actor_model_name_or_path, "--actor_model_name_or_path", config)
    codec = open_codec(config, source, "--actor_model_name_or_path")
    data = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec).train
    if len(data) < config.prompts:
        raise UserError(f"--prompts {config.prompts}: the data have only {len(data)} for step 3")
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    engine = build_engine(config, source, codec)

    rows = tuple(range(config.prompts))[rank() :: world_size()]
    prompts = collate_prompts(data, MicroBatch(rows, (True,) * len(rows)), codec.pad_id)
    sampling = LongTail(
        0.0 if config.greedy else config.temperature,
        config.top_p,
        config.top_k,
        1,
        config.max_answer_seq_len,
        draw_lengths=True,
    )
    lengths = response_limits(config.seed, 0, prompts.prompt_index, sampling)[:, 1]
    uniform = uniforms(config.seed, 0, prompts.prompt_index, config.max_answer_seq_len)
    requests = [
        Request(tuple(ids), *rest)
        for ids, *rest in zip(data[list(rows)]["prompt_ids"], uniform, lengths.tolist(), lengths.tolist())
    ]
    cache = None
    mean_length = float(global_sum(lengths.sum())) / config.prompts

    def plain() -> list[list[int]]:
        responses = []
        for start_row, batch in zip(
            range(0, len(rows), config.per_device_generation_batch_size),
            prompts.to(device()).split(config.per_device_generation_batch_size),
        ):
            these = slice(start_row, start_row + len(batch.lengths))
            responses += cached_generate(
                engine, batch, sampling, uniform[these], lengths[these], end_id=codec.end_id, pad_id=codec.pad_id
            )
        return responses

    def continuous() -> list[list[int]]:
        engine.eval()
        responses = generate_batch(
            engine.module,
            [request.prompt for request in requests],
            lengths.tolist(),
            at_a_time=config.per_device_generation_batch_size,
            pad_id=codec.pad_id,
        )
        engine.train()
        return responses

    def product() -> list[list[int]]:
        nonlocal cache
        with generation_mode(engine) as model:
            decoder = Decoder(
                model, sampling, slots=config.per_device_generation_batch_size, end_ids=codec.end_ids, cache=cache
            )
            responses = decoder.run(requests)
        cache = decoder.cache
        return responses

    def measured(rollout):
        def run() -> Outcome:
            with counted_positions(engine.module, training=False) as positions:
                responses = rollout()
            # The last token of a response is never an input.
            real = int(prompts.lengths.sum()) + int(lengths.sum()) - len(rows)
            return Outcome(len(rows), real, sum(positions), responses, new_tokens=int(lengths.sum()))

        return run

    exact = config.greedy and engine.module.dtype == torch.float32
    standard = plain if config.against == "generate" else continuous
    compare(
        config.chosen({"plain": measured(standard), "product": measured(product)}),
        lambda first, other: same_responses(first, other, exact),
        rounds=config.rounds,
        steps=1,
        about={
            "benchmark": "rollouts",
            "model": config.actor_model_name_or_path,
            "zero_stage": config.actor_zero_stage,
            "dtype": str(engine.module.dtype).removeprefix("torch."),
            "against": config.against,
            "lora_dim": config.actor_lora_dim,
            "greedy": config.greedy,
            "prompts": config.prompts,
            "longest_response": config.max_answer_seq_len,
            "mean_response": mean_length,
            "at_a_time": config.per_device_generation_batch_size,
            "parameters": parameter_count(engine),
        },
    )
    engine.destroy()


def build_engine(config: RolloutBenchmark, source: str, codec):
    """The actor in a training engine, as in step 3."""
    settings = EngineSettings(
        config.actor_zero_stage,
        resolve_dtype(config.dtype),
        config.per_device_training_batch_size,
        config.offload,
        config.max_grad_norm,
        config.deepspeed_config,
    )
    with named_by("--actor_model_name_or_path"):
        model = load_causal_lm(
            source,
            codec,
            dtype=settings.dtype,
            dropout=0.0,
            ds_config=deepspeed_config(settings),
        )
    if config.actor_lora_dim:
        with named_by("--actor_lora_module_name"):
            add_lora(
                model,
                dim=config.actor_lora_dim,
                alpha=config.actor_lora_alpha,
                dropout=0.0,
                modules=config.actor_lora_module_name,
                base_name=source,
                seed=config.seed,
            )
    return training_engine(model, settings, OptimizerSettings(0.0, 0.0, 0.0, "constant", 0, 1))


def parameter_count(engine) -> int:
    """Parameters of the whole model, partitioned or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())


if __name__ == "__main__":
    sys.exit(run_program(main))
