"""Finds out how rows can share a sequence in a model, with the same results as in sequences of their own."""

from __future__ import annotations

import inspect
from enum import Enum

import torch
from datasets import Dataset
from transformers.utils import is_flash_attn_2_available

from common.batching.collate import FlatBatch, PackedBatch, TokenBatch, collate_demonstrations
from common.batching.sampler import MicroBatch
from common.models.attention import attends_by
from common.models.engine import Engine
from common.models.logprobs import response_log_probs
from common.models.quantization import compute_dtype
from common.runtime.distributed import device, on_every_rank, on_gpu
from common.training.memory import requested_size

VARLEN = "flash_attention_2"  # takes concatenated rows of any length, and computes no attention between them
_SHORT = 16


class Packing(Enum):
    """The mechanism that keeps the attention of packed rows apart."""

    FLAT = "attention of variable length, which computes nothing between rows"
    MASKED = "a block-diagonal mask"


def packing_of(engine: Engine, width: int) -> Packing | None:
    """The fastest mechanism that keeps the rows of a sequence of `width` tokens apart; None if neither does.

    Sets the attention implementation of the model accordingly. All ranks must call it.
    """
    causal_lm = engine.module
    plain = causal_lm.config._attn_implementation
    if on_every_rank(supports_varlen(causal_lm.dtype) and attends_by(causal_lm, VARLEN)):
        if on_every_rank(keeps_rows_apart(engine, width, Packing.FLAT)):
            return Packing.FLAT
    attends_by(causal_lm, plain)
    return Packing.MASKED if on_every_rank(keeps_rows_apart(engine, width, Packing.MASKED)) else None


def supports_varlen(dtype: torch.dtype) -> bool:
    """Whether variable-length attention is installed and supports models in `dtype`."""
    return on_gpu() and is_flash_attn_2_available() and dtype != torch.float32


@torch.no_grad()
def keeps_rows_apart(engine: Engine, width: int, packing: Packing) -> bool:
    """Whether two rows have the same log-probabilities packed into a sequence of `width` tokens and on their own.

    If the model ignores the mask or the positions, the second row differs. If the block-diagonal mask replaces the
    model's attention window, the first row, which is long, differs. All ranks must call it.
    """
    causal_lm, computes_in = engine.module, compute_dtype(engine.module)
    if "position_ids" not in inspect.signature(causal_lm.forward).parameters:
        return False  # BLOOM and others, whose positions come from a (B, L) mask
    lengths = [max(width, 2 * _SHORT) - _SHORT, _SHORT]
    random = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(causal_lm.config.get_text_config().vocab_size, (length,), generator=random).tolist()
        for length in lengths
    ]
    rows = Dataset.from_dict({"prompt_ids": [row[:1] for row in ids], "response_ids": [row[1:] for row in ids]})

    def log_probs(micro_batch: MicroBatch, lengths: list[int]) -> torch.Tensor:
        batch: TokenBatch | PackedBatch | FlatBatch = collate_demonstrations(rows, micro_batch, pad_id=0).to(device())
        if isinstance(batch, PackedBatch) and packing is Packing.FLAT:
            batch = batch.flat()
        responses = torch.tensor(lengths, device=device()) - 1
        return response_log_probs(engine, batch.inputs(computes_in), torch.ones_like(responses), responses)

    engine.eval()
    try:
        apart = log_probs(MicroBatch((0, 1), (True, True)), lengths)
        (packed,) = log_probs(MicroBatch((0, 1), (True, True), packs=(2,)), [sum(lengths)])
    except (ImportError, TypeError, ValueError, RuntimeError) as error:  # older GPUs refuse, Falcon with ALiBi the mask
        if requested_size(error) is not None:  # memory that is refused says nothing about packing
            raise
        return False
    finally:
        engine.train()
    # Rounding changes log-probs by about the dtype's epsilon, attention to the other row by much of their spread.
    tolerance = torch.finfo(computes_in).eps ** 0.5
    first, second = lengths
    pairs = (apart[0, : first - 1], packed[: first - 1]), (apart[1, : second - 1], packed[first:])
    return all(
        bool((actual - expected).square().mean().sqrt() <= tolerance * expected.std()) for expected, actual in pairs
    )
