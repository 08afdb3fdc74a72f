"""LoRA adapters of a model directory, in peft's format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from common.models.lora import add_lora, save_adapter

CLASSES = {"causal": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}


def base_model(kind: str, directory: str | Path) -> PreTrainedModel:
    """The model in a directory; for a reward model its new score head is always the same."""
    torch.manual_seed(5)
    return CLASSES[kind].from_pretrained(directory, **({"num_labels": 1} if kind == "reward" else {}))


def with_adapter(model: PreTrainedModel, base_name: str):
    """The model with a new adapter, which changes nothing yet, of the base that is called `base_name`."""
    return add_lora(model, dim=4, alpha=8, dropout=0.0, modules="auto", base_name=base_name, seed=3)


def write_adapter(kind: str, base: str | Path, directory: Path) -> None:
    """Write an adapter that changes the model in the directory `base` visibly."""
    model = with_adapter(base_model(kind, base), str(base))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("score"):
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, model.state_dict(), directory)
