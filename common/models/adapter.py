"""Recognises, refuses or reads model directories with a LoRA adapter in peft's format."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import AdapterError, ModelError

ADAPTER_CONFIG = "adapter_config.json"


def holds_adapter(directory: Path) -> bool:
    """Whether transformers would apply an adapter to the model that it loads from here, and train nothing but that."""
    return (directory / ADAPTER_CONFIG).is_file()


def refuse_adapter(directory: Path) -> None:
    """Raises AdapterError if the directory holds an adapter."""
    if not holds_adapter(directory):
        return
    if (directory / "config.json").is_file():
        raise AdapterError(
            directory,
            f"an adapter ({ADAPTER_CONFIG}) lies beside the whole model, which may or may not have it merged already: "
            "move the adapter's files elsewhere to take the model alone",
        )
    raise AdapterError(
        directory,
        "it is an adapter without its base model: make one model of them with "
        f"`python inference/merge_lora.py --path {directory} --output_dir MERGED`",
    )


def read_adapter(directory: Path) -> tuple[str | None, bool]:
    """The base model that an adapter names, and whether it comes with a score head.

    Raises:
        ModelError: its configuration is damaged.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        saved = set(config.get("modules_to_save") or ())
        return config["base_model_name_or_path"], bool(saved & {"score", "classifier"})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(directory, f"{path} is damaged ({type(error).__name__}: {error})") from None
