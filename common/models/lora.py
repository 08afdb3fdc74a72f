"""Adds low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) to a model in place, through peft.

The model keeps its class and its forward. An adapted layer with weight W (out, in) computes with W + scale B A, where
A (r, in) and B (out, r) are trained and B starts at 0.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.added_token import NewRow, fold_row, train_new_row
from common.models.heads import head_names
from common.models.quantization import QuantizedLinear, full_precision, quantized_layers
from common.paths import from_anywhere

ADAPTER = "default"  # peft's name of the only adapter
LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, its weight (in, out)


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers of any architecture, without the output embeddings and the head that gives scores."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = tuple(f"{name}." for name in head_names(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not output and not f"{name}.".startswith(head)
    ]


def add_lora(
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    dropout: float,
    modules: str,
    base_name: str,
    seed: int,
) -> nn.Module:
    """Freeze `model` and add trainable adapters; a score's head and the row of a new end token stay trainable.

    Args:
        dim: rank r.
        alpha: the product B A is scaled by alpha / r, and A is initialised as peft does it. None: as in DeepSpeed-Chat,
            which published learning rates refer to: scaled by 1 / r, see `_init_as_deepspeed_chat`.
        modules: `auto` for every linear layer, or comma-separated parts of module names.
        base_name: recorded in the adapter's configuration; a directory by its absolute path.
        seed: of the adapters' initial weights, so that they do not depend on how the model was loaded.

    Raises:
        InputError: `modules` matches no linear layer (the message lists the kinds there are).
        AddedTokenError: the row of a new end token cannot be trained.
    """
    from peft import LoraConfig

    linear = linear_modules(model)
    wanted = [part.strip() for part in modules.split(",") if part.strip()]
    targets = linear if modules == "auto" else [name for name in linear if any(part in name for part in wanted)]
    if not targets:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise InputError(modules, f"matches no linear layer; the model's are {', '.join(kinds)}")
    config = LoraConfig(
        r=dim,
        lora_alpha=1 if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        base_model_name_or_path=from_anywhere(base_name),
    )
    torch.manual_seed(seed)
    _inject(model, config)
    if alpha is None:
        _init_as_deepspeed_chat(model)
    return model


def _inject(model: nn.Module, config: Any) -> None:
    """Freeze `model` and add adapters by a LoraConfig."""
    from peft import inject_adapter_in_model

    config.modules_to_save = None  # of a head peft would make a copy
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    model.requires_grad_(False)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    config.modules_to_save = head_names(model) or None
    train_new_row(model)
    cast(Any, model).lora_config = config  # for `has_lora` and `save_adapter`; nn.Module declares no such attribute


def on_full_precision(
    model: nn.Module, state: dict[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, torch.Tensor]] | None:
    """What a quantised model has learnt, on its base in full precision; None for a model that is not quantised.

    Args:
        model: with adapters; only its structure is read.
        state: its full state dict on the CPU.

    Returns:
        The base, loaded anew, with adapters of the same shapes; and the state dict of both.
    """
    base = full_precision(model)
    if base is None:
        return None
    _inject(base, copy.deepcopy(cast(Any, model).lora_config))
    quantized = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    whole: dict[str, torch.Tensor] = {}
    tied: dict[int, torch.Tensor] = {}  # stay one tensor
    for name, value in base.state_dict().items():
        if ".lora_" in name:
            value = state[name]
        elif name not in quantized:  # raised to fp32, so it goes back unchanged
            value = tied.setdefault(id(state[name]), state[name].to(value.dtype))
        whole[name] = value
    return base, whole


def _init_as_deepspeed_chat(model: nn.Module) -> None:
    """Initialise every A from U(-1/sqrt(r), 1/sqrt(r)), as DeepSpeed-Chat does; peft uses 1/sqrt(inputs).

    Adam's first step sets B to the learning rate times signs, so it moves W by (scale / r) * r terms of A: the size of
    A matters as much as the scale. (LinearLayer_LoRA of DeepSpeed-Chat keeps A as (inputs, r), and so its Kaiming
    initialisation takes r for the fan-in.)
    """
    for layer in _lora_layers(model).values():
        down = _down(layer)
        nn.init.uniform_(down, -(len(down) ** -0.5), len(down) ** -0.5)


def has_lora(model: nn.Module) -> bool:
    """True if `add_lora` was applied to this model or a part of it."""
    return any(hasattr(module, "lora_config") for module in model.modules())


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes exactly what its base model does."""
    layers: list[Any] = [*_lora_layers(model).values(), *_new_rows(model).values()]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def folded_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the adapters are part of the base weights: the same function at the base model's speed.

    New tensors hold the sums, and the base weights come back bit for bit afterwards. In half precision each sum is
    rounded once. Quantised weights are restored for it, those of layers without adapters too. The weights must not be
    partitioned.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    quantized = quantized_layers(model)
    try:
        for layer in _lora_layers(model).values():
            base = layer.base_layer
            adapter = _down(layer).data, _up(layer).data, layer.scaling[ADAPTER], layer.fan_in_fan_out
            if isinstance(base, QuantizedLinear):
                base.whole = fold(base.restored(), *adapter)
            else:
                kept.append((base.weight, base.weight.data))
                base.weight.data = fold(base.weight.data, *adapter)
        for base in quantized:
            base.whole = base.restored() if base.whole is None else base.whole
        # Tied embeddings share one weight, which must be changed once.
        for row in {id(module.weight): module for module in _new_rows(model).values()}.values():
            kept.append((row.weight, row.weight.data))
            row.weight.data = fold_row(row.weight.data, row.new_token, row.lora_new_row.data)
        with adapters_disabled(model):
            yield
    finally:
        for weight, data in kept:
            weight.data = data
        for base in quantized:
            base.whole = None


def folding_takes(model: nn.Module) -> int:
    """Bytes that `folded_adapters` needs in addition to the base weights."""
    quantized = quantized_layers(model)
    bases = (layer.base_layer for layer in _lora_layers(model).values())
    folded = [base.weight for base in bases if not isinstance(base, QuantizedLinear)]
    folded += [row.weight for row in _new_rows(model).values()]
    weights = {id(weight): weight for weight in folded}  # tied embeddings share one weight
    return sum(
        getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in weights.values()
    ) + sum(base.in_features * base.out_features * base.computes_in.itemsize for base in quantized)


def fold(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float, transposed: bool) -> torch.Tensor:
    """W + scaling B A, added in fp32.

    Args:
        base: W (out, in), or (in, out) if `transposed`; the result has the same shape and dtype.
        down: A (r, in).
        up: B (out, r).
    """
    product = up.float() @ down.float()
    return (base.float() + scaling * (product.T if transposed else product)).to(base.dtype)


def merged_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the plain model that computes the same as `model` with its adapters.

    Args:
        model: the model with adapters; only its structure is read, so its weights may be partitioned.
        state: its full state dict on the CPU.

    Returns:
        A new state dict with the names of the model before `add_lora`: W + scale B A, added in fp32.
    """
    layers = _lora_layers(model)
    merged = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        name = key.removesuffix(".base_layer.weight")
        if name != key and name in layers:
            down, up = state[f"{name}.lora_A.{ADAPTER}.weight"], state[f"{name}.lora_B.{ADAPTER}.weight"]
            value = fold(value, down, up, layers[name].scaling[ADAPTER], layers[name].fan_in_fan_out)
        merged[key.replace(".base_layer.", ".")] = value
    folded: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for name, module in _new_rows(model).items():
        weight = state[f"{name}.weight"]
        merged[f"{name}.weight"] = folded.setdefault(
            id(weight), fold_row(weight, module.new_token, state[f"{name}.lora_new_row"])
        )
    return merged


def save_adapter(model: nn.Module, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the adapters, and a trained score head, as a directory that `PeftModel.from_pretrained` loads.

    Args:
        model: the model with adapters; only its structure is read.
        state: its full state dict on the CPU.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    head = tuple(f"{name}." for name in head_names(model))
    weights = {
        f"base_model.model.{key.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for key, value in state.items()
        if (".lora_" in key and not key.endswith(".lora_new_row")) or key.startswith(head)
    }
    config: dict[str, Any] = cast(Any, model).lora_config.to_dict()
    # peft saves a trained row in full, and once for tied embeddings.
    rows = {
        id(state[f"{name}.weight"]): (name, module.new_token) for name, module in reversed(_new_rows(model).items())
    }
    for name, token in rows.values():
        row = fold_row(state[f"{name}.weight"], token, state[f"{name}.lora_new_row"])[token : token + 1]
        weights[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] = row.clone()
    config["trainable_token_indices"] = {name: [token] for name, token in rows.values()} or None
    save_file(weights, directory / "adapter_model.safetensors")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; typed as Any, because peft keeps A and B as attributes that it does not declare."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _down(layer: Any) -> torch.Tensor:
    """A (r, in) of an adapted layer."""
    return layer.lora_A[ADAPTER].weight


def _up(layer: Any) -> torch.Tensor:
    """B (out, r) of an adapted layer."""
    return layer.lora_B[ADAPTER].weight


def _new_rows(model: nn.Module) -> dict[str, NewRow]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NewRow)}
