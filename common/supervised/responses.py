"""Lets a model in training answer held-out prompts, with transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from datasets import Dataset

from common.batching.collate import collate_prompts
from common.batching.sampler import MicroBatch
from common.data.tokenization import Codec
from common.models.encoder_decoder import behind_prompts
from common.models.engine import Engine
from common.runtime.distributed import device, world_size


@dataclass(frozen=True)
class Response:
    """A response to a held-out prompt.

    Attributes:
        row: number of the held-out row whose prompt it answers.
        prompt_ids, ids: tokens of the prompt and of the response, to its end token if it has one.
    """

    row: int
    prompt_ids: list[int]
    ids: list[int]


def responses_to(
    engine: Engine,
    held_out: Dataset,
    codec: Codec,
    *,
    prompts: int = 8,
    max_new_tokens: int = 64,
    seed: int | None = None,
) -> list[Response]:
    """Responses to the first distinct held-out prompts. All ranks must call it, and get the same ones.

    Args:
        seed: of sampling from the model's whole distribution; None: greedy.
    """
    rows = first_distinct(held_out, prompts)
    if not rows:
        return []
    micro_batch = MicroBatch(tuple(range(len(rows))), (True,) * len(rows))
    batch = collate_prompts(held_out.select(rows), micro_batch, codec.pad_id).to(device())
    width = batch.input_ids.shape[1]
    positions = getattr(engine.module.config.get_text_config(), "max_position_embeddings", None)
    new_tokens = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
    tokens = batch.input_ids
    if new_tokens > 0:
        with _seeded(seed):
            generated = engine.module.generate(
                input_ids=tokens,
                attention_mask=batch.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=seed is not None,
                **({} if seed is None else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
                use_cache=True,
                synced_gpus=engine.zero_optimization_partition_weights() and world_size() > 1,
            )
        tokens = behind_prompts(engine.module, tokens, generated)
    prompt_ids = held_out.select(rows)["prompt_ids"]
    return [
        Response(row, list(prompt), ids[: codec.end_of(ids) + 1])
        for row, prompt, ids in zip(rows, prompt_ids, tokens[:, width:].tolist())
    ]


def first_distinct(rows: Dataset, count: int) -> list[int]:
    """Indices of the first rows with distinct prompts, at most `count`: a prompt may occur in several rows."""
    row_of_prompt: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        if len(row_of_prompt) == count:
            break
        row_of_prompt.setdefault(tuple(row["prompt_ids"]), index)
    return list(row_of_prompt.values())


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Within the context random numbers begin at the seed; afterwards they go on as if nothing had been drawn."""
    devices = [device().index or 0] if device().type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
