"""Tiny encoder-decoder models as Hugging Face directories, with a unigram tokenizer of T5's kind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.tokenizers_built import CORPUS

_SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
_GATED = {**_SMALL, "feed_forward_proj": "gated-gelu"}

# Model, its configuration. T5 has one matrix for all embeddings, Flan-T5 another one for the output.
ENCODER_DECODERS = {
    "t5": (hf.T5ForConditionalGeneration, _SMALL),
    "flan-t5": (hf.T5ForConditionalGeneration, {**_GATED, "tie_word_embeddings": False}),
}


def t5_unigram(directory: Path, corpus: list[str] = CORPUS) -> Path:
    """T5's: <pad> 0, </s> 1, <unk> 2; </s> closes every text; spaces are one, and no newline is known."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False, initial_alphabet=["\u2581"]
    )
    unigram.train_from_iterator(corpus, trainer)
    pieces = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    hf.T5Tokenizer(vocab=pieces, extra_ids=2).save_pretrained(directory)
    return directory


def build_encoder_decoder(name: str, directory: Path, seed: int = 0, corpus: list[str] = CORPUS, **changes) -> Path:
    """Write a model to `directory`; `changes` go into its configuration."""
    tokenizer = hf.AutoTokenizer.from_pretrained(t5_unigram(directory, corpus))
    model_class, settings = ENCODER_DECODERS[name]
    torch.manual_seed(seed)
    config = model_class.config_class(
        vocab_size=len(tokenizer) + 4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **{**settings, **changes},
    )
    model = model_class(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if not settings.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.save_pretrained(directory)
    return directory
