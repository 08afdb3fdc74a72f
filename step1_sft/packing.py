"""How rows can share a sequence in a model that must compute the same for them as for rows on their own."""

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
from common.runtime.distributed import device, on_every_rank, on_gpu

VARLEN = "flash_attention_2"  # takes rows of any length one after another, and computes nothing between them
_SHORT = 16


class Packing(Enum):
    """What keeps the rows apart."""

    FLAT = "attention of variable length, which computes nothing between rows"
    MASKED = "a block-diagonal mask"


def packing_of(engine: Engine, width: int) -> Packing | None:
    """The best way that keeps the rows of a sequence of `width` tokens apart; None if no way does.

    The model is left with the attention that goes with it. All ranks must call it.
    """
    causal_lm = engine.module
    plain = causal_lm.config._attn_implementation
    if on_every_rank(varlen_serves(causal_lm.dtype) and attends_by(causal_lm, VARLEN)):
        if on_every_rank(keeps_rows_apart(engine, width, Packing.FLAT)):
            return Packing.FLAT
    attends_by(causal_lm, plain)
    return Packing.MASKED if on_every_rank(keeps_rows_apart(engine, width, Packing.MASKED)) else None


def varlen_serves(dtype: torch.dtype) -> bool:
    """Whether attention of variable length is installed and made for models in `dtype`."""
    return on_gpu() and is_flash_attn_2_available() and dtype != torch.float32


@torch.no_grad()
def keeps_rows_apart(engine: Engine, width: int, way: Packing) -> bool:
    """Compare the log-probabilities of two rows, packed into a sequence of `width` tokens and on their own.

    A mask or positions that the model ignores show in the second row, a window of attention that the block-diagonal
    mask overrides in the first, long one. All ranks must call it.
    """
    causal_lm = engine.module
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
        if isinstance(batch, PackedBatch) and way is Packing.FLAT:
            batch = batch.flat()
        responses = torch.tensor(lengths, device=device()) - 1
        return response_log_probs(engine, batch.inputs(causal_lm.dtype), torch.ones_like(responses), responses)

    engine.eval()
    try:
        apart = log_probs(MicroBatch((0, 1), (True, True)), lengths)
        (packed,) = log_probs(MicroBatch((0, 1), (True, True), packs=(2,)), [sum(lengths)])
    except (ImportError, TypeError, ValueError, RuntimeError):  # an older GPU refuses; Falcon with ALiBi the mask
        return False
    finally:
        engine.train()
    # Rounding moves results by about the type's epsilon, a row that sees another by a good part of their spread.
    tolerance = torch.finfo(causal_lm.dtype).eps ** 0.5
    first, second = lengths
    pairs = (apart[0, : first - 1], packed[: first - 1]), (apart[1, : second - 1], packed[first:])
    return all(
        bool((found - expected).square().mean().sqrt() <= tolerance * expected.std()) for expected, found in pairs
    )
