"""Whether a model directory holds the model that its config.json describes, all of it and nothing else.

What is read are names and shapes: no weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from common.models.scalar import is_scalar_config

# Heads beside the model's own: a language model's where scores are wanted, and what others leave with an actor.
_LEFT_OVER = re.compile(r"(^|\.)(lm_head|embed_out|score|v_head|value_head|mtp)\.")
# No weights at all: masks, positions and version numbers that older versions saved, and that every model makes itself.
_NO_WEIGHTS = re.compile(r"(^|\.)(version|_float_tensor|position_ids|inv_freq|masked_bias|(attn|attention)\.bias)$")


def surplus(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the weights that a model has no use for, those of heads, which may well be left over, and all others."""
    heads, others = [], []
    for name in sorted(names):
        if _NO_WEIGHTS.search(name):
            continue
        (heads if _LEFT_OVER.search(name) else others).append(name)
    return heads, others


def problem(directory: Path, trust_remote_code: bool = False) -> str | None:
    """Why transformers could not load a saved directory as the whole model of its config.json; None if it could."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if (directory / "adapter_config.json").exists():
        return "it holds an adapter, adapter_config.json"
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        scores = is_scalar_config(config) or _saved_labels(directory) is not None  # code of its own has other names
        auto_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        _, loading = auto_class.from_pretrained(
            directory, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a missing or damaged file shows itself as almost any type, down in the libraries
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, loading[f"{kind}_keys"]))
        if names:
            return f"{len(names)} of its weights are {kind}, such as {names[0]}"
    return None


def score_labels(source: str, config) -> int | None:
    """How many numbers a classifier gives, as its weights say, or else its config.json where that is explicit."""
    saved = _saved_labels(Path(source))
    if saved is not None:
        return saved
    return config.num_labels if config.num_labels != 2 else None  # 2 is also what transformers takes where none is said


def _saved_labels(directory: Path) -> int | None:
    """Rows of the score head in a directory's safetensors; None where there is none to be read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        try:
            with safe_open(path, "pt") as file:
                if "score.weight" in file.keys():
                    return file.get_slice("score.weight").get_shape()[0]
        except (OSError, SafetensorError):
            return None  # loading it says what is wrong
    return None
