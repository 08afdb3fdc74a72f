"""The actor as a generator and back: whole weights, adapters folded in, no hooks; then training goes on as if nothing
had been."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from common.models.lora import folded_adapters, folding_takes
from common.runtime.distributed import memory_available, on_every_rank

GATHERING_TAKES = 2  # times the weights: what is gathered is held once more while it is put in order


@contextlib.contextmanager
def generation_mode(engine) -> Iterator[nn.Module]:
    """Within the context the engine's module decodes fast on this rank alone; all ranks enter and leave together.

    Under ZeRO-3 every parameter is gathered once, and DeepSpeed's hooks, which would partition it again after each
    forward pass, are off. LoRA adapters are folded into the base weights. On leaving, every weight is bit for bit what
    it was. Evaluation mode keeps dropout and gradient checkpointing away.
    """
    module = engine.module
    engine.eval()
    try:
        with _whole_weights(engine), folded_adapters(module):
            yield module
    finally:
        engine.train()


def whole_model_fits(engine) -> bool:
    """Whether each rank can hold all of the engine's weights, and those with adapters folded in, besides what it holds
    now; the same answer on all."""
    if not engine.zero_optimization_partition_weights():
        return True
    weights = sum(parameter.ds_numel * parameter.element_size() for parameter in engine.module.parameters())
    return on_every_rank(memory_available() > GATHERING_TAKES * weights + folding_takes(engine.module))


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
    on_the_whole = offload.module._forward_pre_hooks
    with deepspeed.zero.GatheredParameters(parameters):
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            while hooks:
                hooks.pop().remove()
        # That of the whole module is in no list. It compares the ranks, and a rank without prompts has no forward pass.
        begins = on_the_whole.pop(offload.fwd_pre_hook.id)
        try:
            yield
        finally:
            # This also has DeepSpeed record anew in which order the modules are used.
            offload._register_deepspeed_module(offload.module)
            on_the_whole[offload.fwd_pre_hook.id] = begins
            on_the_whole.move_to_end(offload.fwd_pre_hook.id, last=False)
