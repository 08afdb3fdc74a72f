"""The row of an end token that the vocabulary had no room for: where it starts, and how it learns beside LoRA.

What transformers puts into a new row, the mean of all others, gives a token that is never the likeliest; frozen, it
would stay so, and no answer would ever end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from common.errors import UserError


def start_row(model, token: int, like: int | None) -> None:
    """Note that `token` is new to the model, and start its input and output row as a copy of the token `like`'s."""
    model.new_token = token
    for module in _embeddings(model) if like is not None else ():
        for parameter in module.parameters():
            with _whole(parameter), torch.no_grad():
                parameter[token] = parameter[like]


def train_new_row(model, flag: str) -> None:
    """Give the frozen row of a new token a trainable change, one for both embeddings where they are tied.

    Raises:
        UserError: the embeddings do more than to look up and to multiply; `flag` asked for LoRA.
    """
    token = getattr(model, "new_token", None)
    if token is None:
        return
    modules = _embeddings(model)
    for module in modules:
        if type(module) not in _TRAINED:
            raise UserError(
                f"--add_eot_token: the vocabulary has no room for the end token, and {flag} cannot train a "
                f"new row of {type(module).__name__}: use the tokenizer's own end token"
            )
    first = modules[0]
    change = nn.Parameter(torch.zeros(first.embedding_dim, dtype=first.weight.dtype, device=first.weight.device))
    for module in modules:
        module.__class__ = _TRAINED[type(module)]  # same parameters and names, another forward
        module.new_token = token
        tied = module.weight is first.weight
        module.lora_new_row = change if tied else nn.Parameter(torch.zeros_like(change))


class NewRow:
    """A part of a model with a new row: row `new_token` of its weight counts as that plus `lora_new_row`, (H,).

    That has LoRA in its name because it learns as the adapters do: at their rate, and off where they are off.
    """

    _disable_adapters = False


class _Embedding(NewRow, nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        if self._disable_adapters:
            return rows
        return rows + (ids == self.new_token).unsqueeze(-1) * self.lora_new_row


class _Linear(NewRow, nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden)
        if not self._disable_adapters:
            logits[..., self.new_token] += hidden @ self.lora_new_row
        return logits


_TRAINED = {nn.Embedding: _Embedding, nn.Linear: _Linear}


def fold_row(weight: torch.Tensor, token: int, change: torch.Tensor) -> torch.Tensor:
    """A copy of weight (V, H) with change (H,) added to the row of `token`, in fp32."""
    row = (weight[token].float() + change.float()).to(weight.dtype)
    return weight.index_copy(0, torch.tensor([token], device=weight.device), row[None])


def _embeddings(model) -> list[nn.Module]:
    output = model.get_output_embeddings()
    return [model.get_input_embeddings()] + ([output] if output is not None else [])


@contextlib.contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """Within the context a parameter that ZeRO-3 has partitioned is whole; what rank 0 writes to it stays."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
