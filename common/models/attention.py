"""Chooses the attention implementation of a transformers model."""

from __future__ import annotations

from transformers import PreTrainedModel


def attends_by(model: PreTrainedModel, implementation: str) -> bool:
    """Change the model's attention. Returns False, and leaves the model as it was, if it cannot have this one.

    transformers raises an exception if the implementation is not installed. For a model with attention code of its own
    (BLOOM, Falcon) it only logs a line, so the result is read back.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError):
        return False
    return model.config._attn_implementation == implementation
