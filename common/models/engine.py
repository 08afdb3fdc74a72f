"""The part of a DeepSpeed engine that this project uses, as a type; DeepSpeed itself has no types."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingEngine(Protocol):
    """A DeepSpeed engine around a model of transformers or a `ScalarModel`.

    Always call the engine, never a part of `module`: the hooks by which ZeRO-3 gathers weights sit on the whole model.

    Attributes:
        module: the model.
        optimizer: DeepSpeed's own around the optimizer of torch; None for a model that is not trained.
        lr_scheduler: the schedule of the learning rate; None for a model that is not trained.
    """

    module: Any
    optimizer: Any
    lr_scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def backward(self, loss: Any, *, scale_wrt_gas: bool = True) -> Any: ...

    def step(self) -> Any: ...

    def destroy(self) -> None: ...

    def get_global_grad_norm(self) -> Any: ...

    def get_lr(self) -> list[float]: ...

    def zero_optimization_partition_weights(self) -> bool: ...

    def zero_optimization_stage(self) -> int: ...

    def _zero3_consolidated_16bit_state_dict(self) -> dict[str, Any] | None: ...
