"""Initialises the embedding of an end token added to a full vocabulary, and trains it with LoRA.

transformers fills a new row with the mean of all others, which makes a token that is never the most probable one. LoRA
freezes the embeddings, so the row would stay like that and no response would ever end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from common.errors import InputError
from common.models.encoder_decoder import is_encoder_decoder


class AddedTokenError(InputError):
    """The row of an added end token cannot be trained beside adapters."""


def start_row(model: PreTrainedModel, token: int, like: int | None) -> None:
    """Record that `token` is new to the model, and copy the rows of the token `like` to its input and output row."""
    model.new_token = token  # type: ignore[assignment]  # nn.Module declares tensors and modules only
    for module in _embeddings(model) if like is not None else ():
        for parameter in module.parameters():
            with _unsharded(parameter), torch.no_grad():
                parameter[token] = parameter[like]


def train_new_row(model: nn.Module) -> None:
    """Add a trainable change to the frozen row of a new token; tied embeddings share one.

    Raises:
        AddedTokenError: the embeddings are of a class that does more than to look up or to multiply, or the model has
            an encoder too.
    """
    token = getattr(model, "new_token", None)
    if token is None:
        return
    assert isinstance(model, PreTrainedModel)  # `start_row` set the token
    modules = _embeddings(model)
    for module in modules:
        # The encoder and the decoder look ids up in modules of their own, which only share the weights.
        if _with_new_row(type(module)) is None or is_encoder_decoder(model.config):
            raise AddedTokenError(
                type(module).__name__,
                "the vocabulary has no room for the added end token, and adapters cannot train a new row of embeddings "
                "of this class: use the tokenizer's own end token",
            )
    first = modules[0]
    assert isinstance(first, nn.Embedding)
    change = nn.Parameter(torch.zeros(first.embedding_dim, dtype=first.weight.dtype, device=first.weight.device))
    for module in modules:
        tied = module.weight is first.weight
        module.__class__ = _with_new_row(type(module))  # type: ignore[assignment]  # same parameters, another forward
        assert isinstance(module, NewRow)
        module.new_token = token
        module.lora_new_row = change if tied else nn.Parameter(torch.zeros_like(change))


class NewRow(nn.Module):
    """An embedding with a new row: row `new_token` of its weight (V, H) is that row plus `lora_new_row` (H,).

    The parameter has LoRA in its name because it is trained as adapters are: at their learning rate, and disabled
    with them.
    """

    new_token: int
    lora_new_row: nn.Parameter
    weight: torch.Tensor
    _disable_adapters: bool = False


class _Embedding(NewRow, nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        if self._disable_adapters:
            return rows
        scale = torch.as_tensor(getattr(self, "embed_scale", 1)).to(self.weight.dtype)
        return rows + (ids == self.new_token).unsqueeze(-1) * (self.lora_new_row * scale)


class _Linear(NewRow, nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden)
        if not self._disable_adapters:
            logits[..., self.new_token] += hidden @ self.lora_new_row
        return logits


_TRAINED: dict[type[nn.Module], type[NewRow]] = {nn.Embedding: _Embedding, nn.Linear: _Linear}


def _with_new_row(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a module of class `kind` with a new row; None if `kind` does more than to look up and to scale, or
    to multiply."""
    if kind.__name__.endswith("ScaledWordEmbedding"):  # Gemma 3 and others multiply what they look up by `embed_scale`
        return type(kind.__name__, (_Embedding, kind), {})
    return _TRAINED.get(kind)


def fold_row(weight: torch.Tensor, token: int, change: torch.Tensor) -> torch.Tensor:
    """A copy of weight (V, H) with change (H,) added to the row of `token`, in fp32."""
    row = (weight[token].float() + change.float()).to(weight.dtype)
    return weight.index_copy(0, torch.tensor([token], device=weight.device), row[None])


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    output = model.get_output_embeddings()
    return [model.get_input_embeddings()] + ([output] if output is not None else [])


@contextlib.contextmanager
def _unsharded(parameter: nn.Parameter) -> Iterator[None]:
    """Within the context all ranks have the full parameter under ZeRO-3 too; what rank 0 writes to it is kept."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
