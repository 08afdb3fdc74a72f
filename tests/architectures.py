"""Tiny models of every supported architecture, with the built-in task's tokenizer, as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from common.models.builtin import materialise

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
_GATED = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
_OPT = {**_SMALL, "ffn_dim": 64, "dropout": 0.1}

CONFIGS = {
    "opt": (hf.OPTConfig, {**_OPT, "word_embed_proj_dim": 32}),
    # OPT-350M's shape: embeddings are projected, and the norms come after the blocks.
    "opt-350m": (hf.OPTConfig, {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": (hf.LlamaConfig, _GATED),
    "mistral": (hf.MistralConfig, {**_GATED, "sliding_window": None}),
    "qwen2": (hf.Qwen2Config, _GATED),
    "gpt-neox": (hf.GPTNeoXConfig, {**_SMALL, "intermediate_size": 64}),
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),  # Conv1D for nn.Linear
}


def build_model(name: str, directory: Path, cache_dir: Path, seed: int = 0, **changes) -> Path:
    """Write a model of architecture `name` to `directory`; `changes` go into its configuration."""
    tokenizer = hf.AutoTokenizer.from_pretrained(materialise("builtin:tiny-opt", cache_dir))
    config_class, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**settings, **changes},
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # larger than usual, so that outputs differ visibly between inputs
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
