"""Export of a trained engine as a standard Hugging Face directory, at any ZeRO stage, with adapters merged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from common.data.tokenization import Codec
from common.models.lora import has_lora, merged_state_dict, save_adapter
from common.models.scalar import ScalarModel
from common.paths import follow_umask
from common.runtime.distributed import barrier, is_main


def full_state_dict(engine) -> dict[str, torch.Tensor] | None:
    """The whole state of the engine's module on the CPU of rank 0, None elsewhere. All ranks must call it."""
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if not is_main():
        return None
    copies: dict[tuple, torch.Tensor] = {}  # tied weights stay one tensor, so that they are written once
    return {
        name: copies.setdefault((value.data_ptr(), value.shape), value.detach().cpu()) for name, value in state.items()
    }


def export_model(engine, codec: Codec, directory: str | Path, adapter_directory: str | Path | None = None) -> None:
    """Write model (safetensors), config, generation config and tokenizer. All ranks must call it.

    Args:
        engine: a DeepSpeed engine around a causal language model or a `ScalarModel`.
        directory: what is there of the same names is replaced.
        adapter_directory: where a LoRA model's adapters go besides the merged model.
    """
    write_model(engine.module, full_state_dict(engine), codec, directory, adapter_directory)


def write_model(
    module: nn.Module,
    state: dict[str, torch.Tensor] | None,
    codec: Codec,
    directory: str | Path,
    adapter_directory: str | Path | None = None,
) -> None:
    """`export_model` with the whole state at hand on rank 0; the other ranks wait."""
    if is_main():
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(module, ScalarModel):
            module, state = module.classifier, {name.removeprefix("classifier."): v for name, v in state.items()}
        if has_lora(module):
            if adapter_directory is not None:
                save_adapter(module, state, Path(adapter_directory))
                follow_umask(*Path(adapter_directory).glob("*.safetensors"))
            state = merged_state_dict(module, state)
        use_cache, module.config.use_cache = module.config.use_cache, True
        module.save_pretrained(directory, state_dict=state)
        module.config.use_cache = use_cache
        codec.tokenizer.save_pretrained(directory)
        follow_umask(*directory.glob("*.safetensors"))
    barrier()
