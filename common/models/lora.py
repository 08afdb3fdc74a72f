"""Low-rank adapters through peft, injected in place so that a model keeps its class and its forward."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.errors import UserError
from common.models.added_token import NewRow, fold_row, train_new_row
from common.paths import from_anywhere

ADAPTER = "default"
LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, its weight (in, out)


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers of any architecture, without the output embeddings and the score head."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not output and not name.endswith("score")
    ]


def add_lora(
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    dropout: float,
    modules: str,
    flag: str,
    base_name: str,
    seed: int,
) -> nn.Module:
    """Freeze `model` and give it trainable adapters; a `score` head stays trainable, and the row of a new end token.

    Args:
        dim: rank r.
        alpha: the adapters' product B A is scaled by alpha / r, and A starts as peft's does. None: adapters as
            DeepSpeed-Chat's, which a published learning rate is meant for: scaled by 1 / r, see `_start_as_published`.
        modules: `auto` for every linear layer, or comma-separated parts of module names.
        flag: the name of the option that `modules` came from, for the error.
        base_name: recorded in the adapter's configuration; a directory by its absolute path.
        seed: of the adapters' initial weights, which then do not depend on how the model was loaded.

    Raises:
        UserError: `modules` matches no linear layer; the message lists the kinds there are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = linear_modules(model)
    wanted = [part.strip() for part in modules.split(",") if part.strip()]
    targets = linear if modules == "auto" else [name for name in linear if any(part in name for part in wanted)]
    if not targets:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"{flag} {modules}: matches no linear layer; the model's are {', '.join(kinds)}")
    model.requires_grad_(False)
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(
        r=dim,
        lora_alpha=1 if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=transposed,
        base_model_name_or_path=from_anywhere(base_name),
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    if alpha is None:
        _start_as_published(model)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
        config.modules_to_save = ["score"]
    train_new_row(model, flag)
    model.lora_config = config
    return model


def _start_as_published(model: nn.Module) -> None:
    """Start every A from U(-1/sqrt(r), 1/sqrt(r)), as DeepSpeed-Chat does; peft has 1/sqrt(inputs) there.

    Adam's first step sets B to the learning rate times signs, so it moves the weight W by (scale / r) * r terms of A:
    the size of A counts as much as the scale does. (LinearLayer_LoRA of DeepSpeed-Chat keeps A as (inputs, r), and
    takes the second dimension for the fan-in of its Kaiming start.)
    """
    from peft.tuners.lora import LoraLayer

    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        down = layer.lora_A[ADAPTER].weight
        nn.init.uniform_(down, -(len(down) ** -0.5), len(down) ** -0.5)


def has_lora(model: nn.Module) -> bool:
    """True if `add_lora` was applied to this model or a part of it."""
    return any(hasattr(module, "lora_config") for module in model.modules())


@contextlib.contextmanager
def adapters_disabled(model: nn.Module):
    """Within the context the model computes exactly what its base model does."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, NewRow))]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def folded_adapters(model: nn.Module):
    """Within the context the adapters are part of the base weights: the same function at the base model's speed.

    The folded weights are tensors of their own, put in the place of the base weights, which come back bit for bit.
    In half precision the sum is rounded once. The weights must be whole.
    """
    from peft.tuners.lora import LoraLayer

    kept = []
    try:
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            weight = layer.base_layer.weight
            kept.append((weight, weight.data))
            weight.data = fold(
                weight.data,
                layer.lora_A[ADAPTER].weight.data,
                layer.lora_B[ADAPTER].weight.data,
                layer.scaling[ADAPTER],
                layer.fan_in_fan_out,
            )
        # Tied embeddings have one weight, which changes once.
        for layer in {id(module.weight): module for module in model.modules() if isinstance(module, NewRow)}.values():
            kept.append((layer.weight, layer.weight.data))
            layer.weight.data = fold_row(layer.weight.data, layer.new_token, layer.lora_new_row.data)
        with adapters_disabled(model):
            yield
    finally:
        for weight, data in kept:
            weight.data = data


def folding_takes(model: nn.Module) -> int:
    """Bytes that `folded_adapters` holds besides the base weights."""
    from peft.tuners.lora import LoraLayer

    weights = {
        id(weight): weight
        for module in model.modules()
        if isinstance(module, (LoraLayer, NewRow))
        for weight in [module.base_layer.weight if isinstance(module, LoraLayer) else module.weight]
    }
    return sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in weights.values())


def fold(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float, transposed: bool) -> torch.Tensor:
    """W + scaling B A, added in fp32. base (out, in), or (in, out) if `transposed`, as is what is returned; down A
    (r, in), up B (out, r)."""
    product = up.float() @ down.float()
    return (base.float() + scaling * (product.T if transposed else product)).to(base.dtype)


def merged_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the plain model that computes the same as `model` with its adapters.

    Args:
        model: the model with adapters; only its structure is read, so its weights may be partitioned.
        state: its whole state dict on the CPU.

    Returns:
        A new state dict with the names of the model before `add_lora`: W + (alpha / r) B A, added in fp32.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
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


def _new_rows(model: nn.Module) -> dict[str, NewRow]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NewRow)}


def save_adapter(model: nn.Module, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the adapters, and a trained score head, as a directory that `PeftModel.from_pretrained` loads."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.model.{key.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for key, value in state.items()
        if (".lora_" in key and not key.endswith(".lora_new_row")) or key.startswith("score.")
    }
    config = model.lora_config.to_dict()
    # peft keeps a trained row whole, and once for tied embeddings.
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
