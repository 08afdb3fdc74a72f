"""Tiny models of every supported architecture as Hugging Face directories.

Decoders have the built-in task's tokenizer, encoders one of their own family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf

from common.models.builtin import materialise
from tests.tokenizers_built import CORPUS, bert_wordpiece, deberta_sentencepiece, roberta_bpe

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

_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256}
_GEMMA = {**_GATED, "head_dim": 8}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

# Families, and shapes of a family, that tests of every architecture take with --long only.
FURTHER_CONFIGS = {
    "qwen3": (hf.Qwen3Config, {**_GATED, "head_dim": 16}),
    "falcon": (hf.FalconConfig, {**_FALCON, "alibi": False}),  # one key-value head, attention beside the feed-forward
    "falcon-40b": (hf.FalconConfig, {**_FALCON, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (hf.FalconConfig, {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "gptj": (hf.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    # Every second layer attends to a window; half of the range, so that it counts.
    "gpt-neo": (
        hf.GPTNeoConfig,
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 256,
            "max_position_embeddings": 256,
        },
    ),
    "phi": (hf.PhiConfig, {**_SMALL, "intermediate_size": 64}),
    "phi3": (hf.Phi3Config, {**_GATED, "original_max_position_embeddings": 256}),
    "stablelm": (hf.StableLmConfig, _GATED),
    "gemma": (hf.GemmaConfig, _GEMMA),
    "gemma2": (hf.Gemma2Config, {**_GEMMA, **_WINDOW}),
    "gemma3": (hf.Gemma3TextConfig, {**_GEMMA, **_WINDOW}),
    "olmo": (hf.OlmoConfig, {**_GATED, "clip_qkv": 8.0}),
    "olmo2": (hf.Olmo2Config, _GATED),
    "olmo3": (hf.Olmo3Config, {**_GATED, **_WINDOW}),
    "smollm3": (hf.SmolLM3Config, {**_GATED, "no_rope_layer_interval": 2}),
    "mpt": (hf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
}


def build_model(name: str, directory: Path, cache_dir: Path, seed: int = 0, **changes) -> Path:
    """Write a model of architecture `name` to `directory`; `changes` go into its configuration."""
    tokenizer = hf.AutoTokenizer.from_pretrained(materialise("builtin:tiny-opt", cache_dir))
    config_class, settings = (CONFIGS | FURTHER_CONFIGS)[name]
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


_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_DEBERTA = {
    **_ENCODER,
    "max_position_embeddings": 256,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_dropout": 0.1,
    "max_relative_positions": -1,
}

# Tokenizer, masked language model (as these are published), its configuration.
ENCODERS = {
    "deberta-v3": (deberta_sentencepiece, hf.DebertaV2ForMaskedLM, {**_DEBERTA, "legacy": False}),
    "deberta-v2": (deberta_sentencepiece, hf.DebertaV2ForMaskedLM, {**_DEBERTA, "conv_kernel_size": 3}),
    "roberta": (roberta_bpe, hf.RobertaForMaskedLM, {**_ENCODER, "max_position_embeddings": 258}),
    "bert": (bert_wordpiece, hf.BertForPreTraining, {**_ENCODER, "max_position_embeddings": 256}),
}


def build_encoder(name: str, directory: Path, seed: int = 0, corpus: Sequence[str] = CORPUS, **changes) -> Path:
    """Write a pre-trained encoder to `directory`, as its family publishes it: without a classification head."""
    make_tokenizer, model_class, settings = ENCODERS[name]
    tokenizer = hf.AutoTokenizer.from_pretrained(make_tokenizer(directory, corpus))
    torch.manual_seed(seed)
    config = model_class.config_class(
        vocab_size=len(tokenizer) + 3, pad_token_id=tokenizer.pad_token_id, **{**settings, **changes}
    )
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory
