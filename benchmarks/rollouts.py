"""Rollouts: continuous batching in generation mode against `generate` with a cache. --help says all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch
from datasets import Dataset

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
from common.data.tokenization import Codec
from common.errors import UserError, named_by
from common.models.engine import Engine
from common.models.loading import load_causal_lm
from common.models.lora import add_lora
from common.models.quantization import compute_dtype
from common.runtime.distributed import device, global_sum, rank, world_size
from common.runtime.program import run_program, start
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    TrainedEngine,
    deepspeed_config,
    resolve_dtype,
    training_engine,
)
from step3_ppo.config import PPOConfig
from step3_ppo.generation.continuous_batching import Decoder, Request, SlotCache
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
        "transformers' standard way, its continuous batching (greedy, ZeRO 0), or the product's own with adapters "
        "beside the weights, not folded in",
        choices=("generate", "generate_batch", "unfolded"),
    )
    critic_model_name_or_path: PathName = option("none", "", ignored="no reward model takes part")

    def validate(self) -> None:
        super().validate()
        if self.against == "generate_batch" and not (self.greedy and self.actor_zero_stage == 0):
            raise UserError(
                "--against generate_batch draws from random numbers of its own and knows no ZeRO-3: add "
                "--greedy --actor_zero_stage 0"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Both ways answer the same prompts with the same random numbers and the same imposed lengths."""
    config = with_data(parse(RolloutBenchmark, argv))
    if config.prompts % world_size():
        raise UserError(f"--prompts {config.prompts}: must be a multiple of the {world_size()} ranks")
    source = random_model(config.actor_model_name_or_path, "--actor_model_name_or_path", config)
    codec = open_codec(config, source)
    data = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec).train
    if len(data) < config.prompts:
        raise UserError(f"--prompts {config.prompts}: the data have only {len(data)} for step 3")
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    engine = build_engine(config, source, codec)
    work = Rollouts(config, engine, codec, data)
    mean_length = float(global_sum(work.lengths.sum())) / config.prompts
    standard = {"generate": work.generate, "generate_batch": work.generate_batch, "unfolded": work.unfolded}
    exact = config.greedy and compute_dtype(engine.module) == torch.float32
    compare(
        config.chosen({"plain": work.counted(standard[config.against]), "product": work.counted(work.product)}),
        lambda first, other: same_responses(first, other, exact),
        rounds=config.rounds,
        steps=1,
        about=described(config, engine, mean_length),
    )
    engine.destroy()


class Rollouts:
    """This rank's prompts, and the ways to respond to them; each returns the responses in the order of the prompts.

    Attributes:
        lengths: (B,) the imposed lengths of the responses.
    """

    def __init__(self, config: RolloutBenchmark, engine: Engine, codec: Codec, data: Dataset):
        self.engine, self.codec = engine, codec
        self.at_a_time = config.per_device_generation_batch_size
        rows = tuple(range(config.prompts))[rank() :: world_size()]
        self.prompts = collate_prompts(data, MicroBatch(rows, (True,) * len(rows)), codec.pad_id)
        self.sampling = LongTail(
            0.0 if config.greedy else config.temperature,
            config.top_p,
            config.top_k,
            1,
            config.max_answer_seq_len,
            draw_lengths=True,
        )
        self.lengths = response_limits(config.seed, 0, self.prompts.prompt_index, self.sampling)[:, 1]
        self.uniform = uniforms(config.seed, 0, self.prompts.prompt_index, config.max_answer_seq_len)
        limits = self.lengths.tolist()
        self.requests = [
            Request(tuple(ids), uniform, length, length)
            for ids, uniform, length in zip(data[list(rows)]["prompt_ids"], self.uniform, limits)
        ]
        self.cache: SlotCache | None = None

    def generate(self) -> list[list[int]]:
        """By transformers' `generate`, in batches of a fixed size."""
        responses: list[list[int]] = []
        for batch in self.prompts.to(device()).split(self.at_a_time):
            these = slice(len(responses), len(responses) + len(batch.lengths))
            responses += cached_generate(
                self.engine,
                batch,
                self.sampling,
                self.uniform[these],
                self.lengths[these],
                end_id=self.codec.end_id,
                pad_id=self.codec.pad_id,
            )
        return responses

    def generate_batch(self) -> list[list[int]]:
        """By transformers' continuous batching."""
        self.engine.eval()
        responses = generate_batch(
            self.engine.module,
            [request.prompt for request in self.requests],
            self.lengths.tolist(),
            at_a_time=self.at_a_time,
            pad_id=self.codec.pad_id,
        )
        self.engine.train()
        return responses

    def unfolded(self) -> list[list[int]]:
        """As `product`, with adapters beside the weights."""
        return self.product(fold=False)

    def product(self, fold: bool = True) -> list[list[int]]:
        """By the product's continuous batching; the cache is kept for the next call."""
        with generation_mode(self.engine, fold) as model:
            decoder = Decoder(model, self.sampling, slots=self.at_a_time, end_ids=self.codec.end_ids, cache=self.cache)
            responses = decoder.run(self.requests)
        self.cache = decoder.cache
        return responses

    def counted(self, way: Callable[[], list[list[int]]]) -> Callable[[], Outcome[list[list[int]]]]:
        """One of the ways as a variant."""

        def run() -> Outcome[list[list[int]]]:
            with counted_positions(self.engine.module, training=False) as positions:
                responses = way()
            rows, new_tokens = len(self.requests), int(self.lengths.sum())
            # The last token of a response is never fed back.
            real = int(self.prompts.lengths.sum()) + new_tokens - rows
            return Outcome(rows, real, sum(positions), responses, new_tokens=new_tokens)

        return run


def described(config: RolloutBenchmark, engine: Engine, mean_length: float) -> dict[str, object]:
    """What was asked for."""
    return {
        "benchmark": "rollouts",
        "model": config.actor_model_name_or_path,
        "zero_stage": config.actor_zero_stage,
        "dtype": str(compute_dtype(engine.module)).removeprefix("torch."),
        "against": config.against,
        "lora_dim": config.actor.lora_dim,
        "quantize": config.actor.quantize,
        "greedy": config.greedy,
        "prompts": config.prompts,
        "longest_response": config.max_answer_seq_len,
        "mean_response": mean_length,
        "at_a_time": config.per_device_generation_batch_size,
        "parameters": parameter_count(engine),
    }


def build_engine(config: RolloutBenchmark, source: str, codec: Codec) -> TrainedEngine:
    """The actor in a training engine, as in step 3."""
    settings = EngineSettings(
        config.actor_zero_stage,
        resolve_dtype(config.dtype),
        config.per_device_training_batch_size,
        config.offload,
        config.max_grad_norm,
        config.deepspeed_config,
        config.actor.quantize,
    )
    with named_by("--actor_model_name_or_path"):
        model = load_causal_lm(
            source,
            codec,
            dtype=settings.dtype,
            dropout=0.0,
            ds_config=deepspeed_config(settings),
            quantize=settings.quantize,
        )
    if config.actor.lora_dim:
        with named_by("--actor_lora_module_name"):
            add_lora(
                model,
                dim=config.actor.lora_dim,
                alpha=config.actor.lora_alpha,
                dropout=0.0,
                modules=config.actor.lora_module_name,
                base_name=source,
                seed=config.seed,
            )
    return training_engine(model, settings, OptimizerSettings(0.0, 0.0, 0.0, "constant", 0, 1))


def parameter_count(engine: Engine) -> int:
    """Parameters of the whole model, partitioned or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())


if __name__ == "__main__":
    sys.exit(run_program(main))
