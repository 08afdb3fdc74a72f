"""What weights, adapters and optimizer states take, by the shapes of models: `python benchmarks/memory_plan.py`.

Nothing is measured and no weights are made. Activations, keys and values, and what the libraries take come on top.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from common.models.lora import linear_modules

RANK = 64  # of the adapters
GB = 1e9


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "OPT-125M": _opt(768, 12, 12),
    "OPT-1.3B": _opt(2048, 24, 32),
    "OPT-6.7B": _opt(4096, 32, 32),
    "LLaMA-2-13B": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    ),
}


@dataclass(frozen=True)
class Plan:
    """Bytes of one model with adapters, at ZeRO stage 0.

    Attributes:
        bf16: all weights in bf16.
        int8, nf4: linear layers quantised, all other weights in fp32.
        adapters: with their gradients and the optimizer's moments, in fp32 as beside quantised weights.
        copy: of the linear layers in bf16, on which rollouts are made.
    """

    bf16: float
    int8: float
    nf4: float
    adapters: float
    copy: float


def plan(model: nn.Module, rank: int = RANK) -> Plan:
    """The plan of a model, which may lie on the meta device."""
    layers = [model.get_parameter(f"{name}.weight") for name in linear_modules(model)]
    numbers = sum(weight.numel() for weight in layers)
    outputs = sum(weight.shape[0] for weight in layers)
    others = sum(weight.numel() for weight in model.parameters()) - numbers
    # Of nf4: 4 bits, 8 bits of a scale for 64 numbers, 32 bits of a scale's scale for 256 of these.
    nf4 = numbers * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    adapters = rank * sum(sum(weight.shape) for weight in layers)
    return Plan(
        2.0 * (numbers + others),
        numbers + 4.0 * outputs + 4.0 * others,
        nf4 + 4.0 * others,
        16.0 * adapters,  # weight, gradient, two moments
        2.0 * numbers,
    )


def main() -> None:
    """Print a row for each shape."""
    print(f"| model | weights in bf16 | in int8 | in nf4 | adapters of rank {RANK}, trained | copy for rollouts |")
    print("|---|---|---|---|---|---|")
    for name, config in SHAPES.items():
        with torch.device("meta"):
            sizes = plan(AutoModelForCausalLM.from_config(config))
        figures = (sizes.bf16, sizes.int8, sizes.nf4, sizes.adapters, sizes.copy)
        print(f"| {name} | " + " | ".join(f"{size / GB:.2f} GB" for size in figures) + " |")


if __name__ == "__main__":
    main()
