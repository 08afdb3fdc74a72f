"""Switches the actor to fast generation and back: unsharded weights, LoRA merged, no ZeRO-3 hooks.

A quantised actor decodes on a copy of its weights in full width, adapters folded in: a pass over few tokens would take
far longer to restore the weights than to multiply by them. Where the copy does not fit, the adapters stay beside the
quantised weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from common.models.lora import folded_adapters, folding_takes
from common.models.quantization import quantized_layers
from common.runtime.distributed import memory_available, on_every_rank

GATHERING_TAKES = 2  # times the size of the weights: DeepSpeed copies what it gathers


@contextlib.contextmanager
def generation_mode(engine, fold: bool = True) -> Iterator[nn.Module]:
    """Within the context each rank runs the engine's module by itself; all ranks must enter and leave together.

    Under ZeRO-3 all parameters are gathered once, and DeepSpeed's hooks, which would partition them again after each
    forward pass, are removed. LoRA adapters are folded into the base weights. The module is in evaluation mode, without
    dropout and gradient checkpointing. On leaving, all weights are bit for bit what they were.

    Args:
        fold: fold adapters in, into a quantised model where its copy fits; else they stay beside the weights.
    """
    module = engine.module
    engine.eval()
    try:
        with _whole_weights(engine):
            with folded_adapters(module) if fold and _copy_fits(module) else contextlib.nullcontext():
                yield module
    finally:
        engine.train()


def whole_model_fits(engine) -> bool:
    """Whether each rank has memory for all of the engine's weights, gathered and folded; the same on all ranks."""
    if not engine.zero_optimization_partition_weights():
        return True
    weights = sum(parameter.ds_numel * parameter.element_size() for parameter in engine.module.parameters())
    folding = 0 if quantized_layers(engine.module) else folding_takes(engine.module)
    return on_every_rank(memory_available() > GATHERING_TAKES * weights + folding)


def _copy_fits(module: nn.Module) -> bool:
    """Whether adapters are folded in: always, but into a quantised model only where its copy fits on every rank."""
    return not quantized_layers(module) or on_every_rank(memory_available() > folding_takes(module))


@contextlib.contextmanager
def _whole_weights(engine) -> Iterator[None]:
    if not engine.zero_optimization_partition_weights():
        yield
        return
    import deepspeed

    parameters = list(engine.module.parameters())
    for parameter in parameters:
        parameter.ds_active_sub_modules.clear()
    offload = engine.optimizer.parameter_offload
    root_hooks = offload.module._forward_pre_hooks
    with deepspeed.zero.GatheredParameters(parameters):
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            while hooks:
                hooks.pop().remove()
        # The root module's hook is in neither list. It synchronises the ranks, but a rank without prompts runs no
        # forward pass.
        root_hook = root_hooks.pop(offload.fwd_pre_hook.id)
        try:
            yield
        finally:
            # This also makes DeepSpeed record the order of the modules anew.
            offload._register_deepspeed_module(offload.module)
            root_hooks[offload.fwd_pre_hook.id] = root_hook
            root_hooks.move_to_end(offload.fwd_pre_hook.id, last=False)
