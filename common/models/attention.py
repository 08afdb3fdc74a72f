"""Which implementation of attention a model of transformers computes with."""

from __future__ import annotations


def attends_by(model, implementation: str) -> bool:
    """Change the model's attention; False where it cannot have this one, and is then left as it was.

    transformers refuses what is not installed with an exception, and a model with attention of its own (BLOOM, Falcon)
    with no more than a line in the log.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError):
        return False
    return model.config._attn_implementation == implementation
