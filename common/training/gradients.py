"""Measures and discards the gradients between backward and step, wherever DeepSpeed keeps them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.engine import Engine
from common.runtime.distributed import device


class GradientSize:
    """Measures the gradients that backward passes compute on this rank, before any reduction over ranks.

    Where DeepSpeed keeps gradients differs with the ZeRO stage; autograd calls the hooks of parameters at every stage.

    Attributes:
        squares: scalar, fp32: the sum of the squared gradients of all micro-batches. It is not finite if one of them
            is not.
    """

    def __init__(self, module: nn.Module):
        self.squares = torch.zeros((), device=device())
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square()


def discard_gradients(engine: Engine) -> None:
    """Discard the gradients that a DeepSpeed engine has accumulated since its last step.

    DeepSpeed does this only within `step`, after an overflow; these are the calls that it makes there.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    engine.zero_grad()
    if stage == 0 and not engine.bfloat16_enabled():
        return
    optimizer.zero_grad()
    if stage in (1, 2):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer._offload_accumulated_param_ids = set()
        optimizer._release_preflattened_grad_buffers()
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
    elif stage == 3:
        optimizer._pre_step()
    if stage > 0:
        optimizer.reset_cpu_buffers()
