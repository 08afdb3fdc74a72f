"""Holds the linear layers of a frozen base model in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

`quantize` replaces the layers of a loaded model. nf4: 4-bit NormalFloat in blocks of 64 numbers, whose scales are
quantised too (double quantisation). int8: one scale for each output of a layer. bitsandbytes does both. What stays is
in fp32: embeddings, norms, biases, the output head, the head of a score, and adapters.

A pass restores one layer's weight at a time and multiplies by it. Activations are never quantised: LLM.int8() (arXiv:
2208.07339) treats columns by what is in the whole batch, so that a row's result would depend on the rows beside it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.heads import is_encoder_config
from common.runtime.distributed import device


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a weight of few bits.

    Args:
        layer: of the model, its weight finite; a Conv1D (whose weight is transposed) or a linear layer.
        kind: nf4 or int8.
        compute_dtype: in which it multiplies. Results have the dtype of the inputs, or of the bias if that is wider.

    Attributes:
        weight: the bits: uint8 with two numbers each for nf4, else int8. A parameter, so that ZeRO-3 can partition it.
        scales: what makes numbers of the bits; not partitioned: 0.13 bits a number for nf4, 4 bytes an output for int8.
        whole: the weight (out, in) in the compute dtype, while a copy is wanted, see `common.models.lora`.
    """

    scales: Any
    whole: Tensor | None = None

    def __init__(self, layer: nn.Linear | Conv1D, kind: str, compute_dtype: torch.dtype):
        from bitsandbytes import functional as bits

        weight = layer.weight.data.to(device())
        if isinstance(layer, Conv1D):
            weight = weight.T.contiguous()
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        if kind == "nf4":
            packed, self.scales = bits.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            self.scales.dtype = compute_dtype
        else:
            packed, self.scales, _ = bits.int8_vectorwise_quant(weight.to(torch.float16))
        self.kind = kind
        self.computes_in = compute_dtype  # under the name compute_dtype peft would take it for that of adapters
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def restored(self) -> Tensor:
        """The weight (out, in) in the compute dtype, as the bits have it. It must not be partitioned."""
        from bitsandbytes import functional as bits

        if self.kind == "nf4":
            return bits.dequantize_4bit(self.weight.data, self.scales)
        return bits.int8_vectorwise_dequant(self.weight.data, self.scales).to(self.computes_in)

    def scale_tensors(self) -> list[Tensor]:
        """The scales as tensors, for their size."""
        return [self.scales] if self.kind == "int8" else [self.scales.absmax, self.scales.state2.absmax]

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs.to(self.computes_in), self).to(inputs.dtype)
        return product if self.bias is None else product + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        moved = self.scales.to(self.weight.device)  # bitsandbytes' own object moves in place
        self.scales = self.scales if moved is None else moved
        return self


class _Product(torch.autograd.Function):
    """Inputs (..., in) times the restored weight. The weight is restored anew for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, _weight(layer))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ _weight(ctx.layer), None


def _weight(layer: QuantizedLinear) -> Tensor:
    return layer.restored() if layer.whole is None else layer.whole


def check_quantization(kind: str, dtype: torch.dtype) -> None:
    """Raise InputError if weights cannot be quantised so, in a run that computes in `dtype`. Loads nothing."""
    if kind == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(kind, "the package bitsandbytes is not installed: pip install bitsandbytes")
    if dtype == torch.float16:
        raise InputError(kind, "it computes in bf16 or fp32, and this run would in fp16")


def quantize(
    model: PreTrainedModel,
    layers: Iterable[str],
    kind: str,
    compute_dtype: torch.dtype,
    reload: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Quantise layers of a loaded model in place, and raise all its other weights to fp32.

    With bf16 a decoder's backbone computes in it wherever torch's autocast holds that to be safe; what it returns is
    fp32. Encoders compute in fp32 between their quantised layers: DeBERTa's attention does not run under autocast.

    Args:
        layers: names of linear layers.
        kind: nf4 or int8.
        compute_dtype: float32 or bfloat16.
        reload: loads the same model as it was before, see `full_precision`; needed where it is exported.
    """
    for name in layers:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, QuantizedLinear(_linear(model, name), kind, compute_dtype))
    model.float()
    if compute_dtype != torch.float32 and not is_encoder_config(model.config):
        backbone: Any = model.base_model
        backbone.forward = _autocast(backbone.forward, compute_dtype)
    holder: Any = model
    holder.reload = reload


def _linear(model: nn.Module, name: str) -> nn.Linear | Conv1D:
    layer = model.get_submodule(name)
    assert isinstance(layer, (nn.Linear, Conv1D))
    return layer


def _autocast(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device().type, dtype=dtype):
            return forward(*args, **kwargs)

    return call


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    """The quantised layers of a model; [] if it is not quantised."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def compute_dtype(model: Any) -> torch.dtype:
    """In which a model computes its matrix products: that of its weights, if they are not quantised."""
    layers = quantized_layers(model)
    return layers[0].computes_in if layers else model.dtype


def full_precision(model: Any) -> PreTrainedModel | None:
    """The base of a quantised model as it was before, loaded anew; None for a model that is not quantised.

    What is learnt on quantised weights is added to these: a sum would have to be rounded to the few bits again.
    """
    return model.reload() if quantized_layers(model) else None
