"""Builds tiny models locally, so that the whole pipeline runs without a download.

`builtin:tiny-opt`    an OPT with a byte-level BPE tokenizer that, like OPT's own, prepends `</s>`.
`builtin:tiny-llama`  a LLaMA with grouped-query attention and a sentencepiece tokenizer.

Both tokenizers are trained on the text of the built-in task. The result is a standard Hugging Face directory: config,
generation config, safetensors with seeded random weights, tokenizer. It is used like any other model.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.data.builtin import builtin_rows
from common.errors import ModelError
from common.paths import follow_umask

BUILTIN_MODELS = ("builtin:tiny-opt", "builtin:tiny-llama")

# Raise it whenever a built-in model gets other weights, another configuration or another tokenizer than before.
FORMAT = 1
MAX_POSITIONS = 512
SEED = 20
INIT_STD = 0.04  # twice the usual value: at this width the model learns the task in clearly fewer steps


def materialise(name: str, cache_dir: str | Path) -> Path:
    """The directory of a built-in model under `cache_dir`; it is written on the first call.

    Several processes may call this at once: one writes, under a file lock, and the finished directory appears by a
    rename. Its name contains a hash of `FORMAT` and of the task's text, so that a change of either makes a new model.

    Raises:
        ModelError: there is no built-in model of this name.
        OSError: the cache cannot be written.
    """
    if name not in BUILTIN_MODELS:
        raise ModelError(name, f"it is no built-in model; there are {', '.join(BUILTIN_MODELS)}")
    short = name.removeprefix("builtin:")
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    directory = cache_dir / f"{short}-{_fingerprint()}"
    with FileLock(cache_dir / f"{short}.lock"):
        if not directory.is_dir():
            draft = Path(tempfile.mkdtemp(prefix=f".{short}-", dir=cache_dir))
            try:
                {"tiny-opt": _write_opt, "tiny-llama": _write_llama}[short](draft)
                follow_umask(draft, *draft.iterdir())
                os.rename(draft, directory)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return directory


def _write_opt(directory: Path) -> None:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", specials.index("</s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=INIT_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _write_weights(OPTForCausalLM, config, directory)


def _write_llama(directory: Path) -> None:
    model = io.BytesIO()  # sentencepiece would write a file's name into the model, so its bytes would depend on it
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in _texts() for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    described = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "model_max_length": MAX_POSITIONS,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INIT_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _write_weights(LlamaForCausalLM, config, directory)


def _write_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig, directory: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = model_class(config)
    model.save_pretrained(directory)


def _texts() -> Iterator[str]:
    for row in builtin_rows("courtesy"):
        for answer in (row["chosen"], row["rejected"]):
            yield f"\n\nHuman: {row['prompt']}\n\nAssistant: {answer}"


def _fingerprint() -> str:
    """What decides the content of a built-in model: the version of its recipe and the text of its tokenizer."""
    digest = hashlib.sha256(f"format {FORMAT}\n".encode())
    for text in _texts():
        digest.update(text.encode())
    return digest.hexdigest()[:12]
