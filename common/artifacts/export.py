"""Exports a trained engine as a standard Hugging Face directory, at any ZeRO stage, with adapters merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.tokenization import Codec
from common.models.engine import Engine
from common.models.lora import has_lora, merged_state_dict, on_full_precision, save_adapter
from common.models.scalar import ScoringModel
from common.paths import follow_umask
from common.runtime.distributed import barrier, is_main


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor] | None:
    """The full state of the engine's module on the CPU of rank 0, None on the other ranks. All ranks must call it."""
    state: dict[str, torch.Tensor] | None
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if not is_main():
        return None
    assert state is not None  # DeepSpeed returns it on rank 0
    copies: dict[tuple, torch.Tensor] = {}  # tied weights stay one tensor, so they are written once
    return {
        name: copies.setdefault((value.data_ptr(), value.shape), value.detach().cpu()) for name, value in state.items()
    }


def export_model(
    engine: Engine, codec: Codec, directory: str | Path, adapter_directory: str | Path | None = None
) -> None:
    """Write model (safetensors), config, generation config and tokenizer. All ranks must call it.

    Args:
        engine: around a causal language model or a `ScoringModel`.
        directory: existing files of the same names are replaced.
        adapter_directory: where the adapters of a LoRA model are written, in addition to the merged model.
    """
    write_model(engine.module, full_state_dict(engine), codec, directory, adapter_directory)


def write_model(
    module: nn.Module,
    state: dict[str, torch.Tensor] | None,
    codec: Codec,
    directory: str | Path,
    adapter_directory: str | Path | None = None,
) -> None:
    """Does what `export_model` does, from a full state dict that rank 0 already has. The other ranks wait.

    Args:
        module: a model of transformers or a `ScoringModel`, possibly with adapters; its own weights are not read.
        state: its full state dict on the CPU; needed on rank 0 only. Of a quantised model only what it has learnt is
            written, on the base in full precision.
    """
    if is_main():
        assert state is not None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        model: Any = module
        if isinstance(module, ScoringModel):
            model, state = module.classifier, {name.removeprefix("classifier."): v for name, v in state.items()}
        if (plain := on_full_precision(model, state)) is not None:
            model, state = plain
        if has_lora(model):
            if adapter_directory is not None:
                save_adapter(model, state, Path(adapter_directory))
                follow_umask(*Path(adapter_directory).glob("*.safetensors"))
            state = merged_state_dict(model, state)
        use_cache, model.config.use_cache = model.config.use_cache, True
        model.save_pretrained(directory, state_dict=state)
        model.config.use_cache = use_cache
        codec.tokenizer.save_pretrained(directory)
        follow_umask(*directory.glob("*.safetensors"))
    barrier()
