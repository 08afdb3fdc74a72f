"""Computes attention in the dtype of the key-value cache, which may be wider than the model's.

On a CPU, attention of one query at a time is several times slower in bf16 than in fp32. With keys and values kept in
fp32, only the query is converted at each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.models.attention import attends_by
from common.models.quantization import compute_dtype

_NAME = "sdpa_in_the_caches_dtype"


def _attend(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named):
    with torch.autocast(query.device.type, enabled=False):  # in which a quantised model computes
        output, weights = sdpa_attention_forward(module, query.to(key.dtype), key, value, mask, **named)
    return output.to(query.dtype), weights


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])


def fastest_cache_dtype(model) -> torch.dtype:
    """The dtype that the model computes in; fp32 for bf16 on a CPU. The model's own where attention cannot be replaced.

    A quantised model computes in another dtype than that of its weights which are not quantised.
    """
    computes = compute_dtype(model)
    fastest = torch.float32 if model.device.type == "cpu" and computes == torch.bfloat16 else computes
    if fastest == model.dtype or model.config._attn_implementation != "sdpa":
        return model.dtype
    return fastest if _can_be_replaced(model) else model.dtype


def _can_be_replaced(model) -> bool:
    before = model.config._attn_implementation
    replaced = attends_by(model, _NAME)
    attends_by(model, before)
    return replaced


@contextlib.contextmanager
def attention_in(model, dtype: torch.dtype) -> Iterator[None]:
    """Within the context the model takes keys and values of `dtype` from its cache."""
    if dtype == model.dtype:
        yield
        return
    before = model.config._attn_implementation
    attends_by(model, _NAME)
    try:
        yield
    finally:
        attends_by(model, before)
